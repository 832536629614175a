"""Laws of the rivals: each is, row by row, the ranking that it is named after."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prism_job.evaluate import bm25 as bm25_module
from prism_job.evaluate.bm25 import bm25
from prism_job.evaluate.rivals import Rival, rivals
from prism_job.publish.evaluate import outcome_of
from prism_job.publish.published import load
from prism_job.storage.address import open_store
from tests.conftest import Job, candidate, pair, table_of, turn, write_jsonl


def words_by_hand(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def bm25_by_hand(texts: Sequence[str], query: Sequence[str]) -> list[float]:
    """Lucene's BM25 of each text to the query, word by word."""
    documents = [words_by_hand(text) for text in texts]
    mean_length = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        counts, score = Counter(document), 0.0
        for word in query:
            containing = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - containing + 0.5) / (containing + 0.5))
            saturation = 1.5 * (1 - 0.75 + 0.75 * len(document) / mean_length)
            score += idf * counts[word] / (counts[word] + saturation)
        scores.append(score)
    return scores


def test_bm25_is_that_of_plain_loops_over_texts_and_words() -> None:
    texts = ["", "Paris is Paris; not 5", "the 5 of 6", "!", "Lyon or paris, ÉTÉ été", "nothing wanted at all"]
    queries = [words_by_hand(text) for text in ("Paris 5 absent", "Été, été of 7")]
    wanted: dict[str, float] = {}
    for query in queries:
        for word in query:
            wanted[word] = wanted.get(word, 0) + 1 / len(queries)
    by_query = [bm25_by_hand(texts, query) for query in queries]
    # float64 sums of fewer than ten terms, in another order
    np.testing.assert_allclose(bm25(texts, wanted), np.mean(by_query, axis=0), rtol=1e-12, atol=1e-15)
    assert not bm25(["?", "!"], wanted).any()  # type: ignore[union-attr]


def rivals_of(manifest: Path, sign: float = 1.0) -> dict[str, Rival]:
    published = load(str(manifest))
    spec = published.manifest.spec.spec
    found = rivals(outcome_of(published), published.plan(), open_store(spec.store), spec, sign)
    return {rival.prefix: rival for rival in found}


def ranked(manifest: Path, column: str = "score") -> np.ndarray:
    rows = [row for row in table_of(manifest, "scores") if row["score"] is not None and not row["duplicate"]]
    return np.array([row[column] for row in rows])


@pytest.fixture
def pool(job: Job) -> Job:
    """Ten rows and a copy of the first; two target sets, of which one turns candidates away."""
    write_jsonl(job.folder / "pool" / "b.jsonl", [candidate(0), *(candidate(number) for number in range(20, 25))])
    sets: list[dict[str, Any]] = [{"name": "for", "weight": 2}, {"name": "against", "sign": -1}]
    for number, target_set in enumerate(sets):
        name = target_set["name"]
        path = job.folder / f"{name}.jsonl"
        write_jsonl(path, [pair(7 * number + one) | {"right": one % 2} for one in range(2 + number)])
        target_set["uris"] = [str(path)]
    job.spec["targets"] = {"sets": sets}
    return job


@pytest.mark.parametrize("loss", ["sum", "mean"])
def test_another_score_or_weighting_ranks_as_a_run_with_it_on_the_same_store(pool: Job, loss: str) -> None:
    runs: dict[tuple[str, str], Path] = {}
    for score in ("influence", "cosine"):
        for weighting in ("preference", "uniform"):
            pool.spec["scoring"] = {"loss": loss, "score": score, "weighting": weighting}
            runs[score, weighting] = pool.run()
    prefixes = {"influence": "influence_", "cosine": "cosine_", "preference": "weighted_", "uniform": "uniform_"}
    for (score, weighting), manifest in runs.items():
        found = rivals_of(manifest)
        assert len(ranked(manifest)) == 15
        for other in runs:
            if other[1] == weighting and other[0] != score:
                # One multiplication and one division more, in float64.
                wanted = ranked(runs[other])
                np.testing.assert_allclose(found[prefixes[other[0]]].ranking_N, wanted, rtol=1e-14)
            if other[0] == score and other[1] != weighting:
                np.testing.assert_array_equal(found[prefixes[other[1]]].ranking_N, ranked(runs[other]))
        turned = rivals_of(manifest, -1.0)
        for prefix, rival in found.items():
            same = prefix in ("loss_", "loss_sum_", "length_")
            expected = rival.ranking_N if same else -rival.ranking_N  # type: ignore[operator]
            np.testing.assert_array_equal(turned[prefix].ranking_N, expected)


def test_loss_length_and_bm25_are_those_of_the_rows(pool: Job) -> None:
    manifest = pool.run()
    found, numbers = rivals_of(manifest), [*range(10), *range(20, 25)]
    np.testing.assert_array_equal(found["length_"].ranking_N, ranked(manifest, "num_tokens"))
    np.testing.assert_array_equal(found["loss_sum_"].ranking_N, -ranked(manifest, "nll"))
    messages = [candidate(number)["messages"] for number in numbers]
    texts = ["\n".join(f"{it['role']}: {it['content']}" for it in of) for of in messages]
    wanted = np.zeros(len(texts))
    for signed_weight, pairs in ((2, range(2)), (-1, range(7, 10))):
        queries = [words_by_hand(f"assistant: Paris {number}") for number in pairs]
        wanted += signed_weight * np.mean([bm25_by_hand(texts, query) for query in queries], axis=0)
    np.testing.assert_allclose(found["bm25_"].ranking_N, wanted, rtol=1e-12, atol=1e-12)


def test_each_rival_has_figures_or_a_reason_by_verb_and_document(pool: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.spec["evaluation"] = {"label": "label"}
    figures = pool.passes("evaluate", str(pool.run()))
    prefixes = ["loss_", "loss_sum_", "length_", "cosine_", "uniform_", "bm25_"]
    assert [rival["prefix"] for rival in figures["rivals"]] == prefixes
    for prefix in prefixes:
        for name in (f"{prefix}auroc", f"{prefix}precision_at_budget", f"{prefix}recall_at_budget"):
            assert 0 <= figures[f"{name}_low"] <= figures[name] <= figures[f"{name}_high"] <= 1
        difference = f"auroc_over_{prefix[:-1]}"
        assert figures[difference] == pytest.approx(figures["auroc"] - figures[f"{prefix}auroc"])
        assert figures[f"{difference}_low"] <= figures[difference] <= figures[f"{difference}_high"]
    monkeypatch.setattr(bm25_module, "MAX_WORDS", 20)
    pool.spec["scoring"] = {"weighting": "uniform"}
    write_jsonl(pool.folder / "for.jsonl", [{"prompt": [turn("user", "a")], "chosen": [turn("assistant", "b")]}])
    manifest = pool.run()
    reasons = {rival["prefix"]: rival["reason"] for rival in pool.passes("evaluate", str(manifest))["rivals"]}
    assert "no rejected response" in reasons.pop("weighted_")
    assert "words" in reasons.pop("bm25_")
    assert set(reasons.values()) == {None}


def test_where_the_store_was_cleared_what_needs_no_row_is_still_compared(job: Job) -> None:
    manifest = job.run()
    for path in (job.folder / "store").rglob("*.safetensors"):
        path.unlink()
    figures = job.passes("evaluate", str(manifest))
    reasons = {rival["prefix"]: rival["reason"] for rival in figures["rivals"]}
    assert "missing shard" in reasons.pop("uniform_")
    assert "uniform_auroc" not in figures
    assert set(reasons.values()) == {None}
