"""Laws of `explain`: contributions are those of each pair alone, row by row, and add up to the score that was published."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.follow.selections.explain_text import explain_text
from prism_job.score.direction import fold_directions
from prism_job.store import codec, shards
from tests.conftest import Job, candidate, pair, read_json, table_of, write_jsonl
from tests.publish.test_diff import words_of

Row = dict[str, Any]
SIGNED = {"good": (2.0, 1), "bad": (0.5, -1)}


def use_sets(job: Job) -> None:
    """Two sets of three pairs and of two, the second to be avoided; an exact duplicate; a row without a score."""
    write_jsonl(job.folder / "bad.jsonl", [pair(number) for number in range(3, 5)])
    job.spec["targets"] = {
        "sets": [
            {"name": "good", "uris": [str(job.folder / "targets.jsonl")], "weight": 2.0},
            {"name": "bad", "uris": [str(job.folder / "bad.jsonl")], "weight": 0.5, "sign": -1},
        ]
    }
    rows = [candidate(number) for number in (*range(9), 3)]
    write_jsonl(job.folder / "pool" / "a.jsonl", [*rows, {"prompt": "x " * 200, "completion": "y"}])
    job.spec["candidates"]["maxBadFraction"] = 0.2


def of_each_pair_alone(job: Job, manifest: Path) -> tuple[np.ndarray, np.ndarray]:
    """Contributions [N, Q] by the plain formula on decoded rows, and ‖row_z‖ Σ of the norms of all directions [N].

    Each pair's row goes through `fold_directions` alone, whose own laws are in tests/score/test_curvature.py and
    tests/store/test_projection.py.
    """
    run, plan, store = job.parsed(), job.planned(), job.store()
    spec = run.spec
    target_shards = [shards.read_shard(store, plan.extractor, "targets", unit.id) for unit in plan.targets]
    layers = target_shards[0].notes["layers"]
    sketches = np.concatenate([shard.arrays["rows"] for shard in target_shards]).astype(np.float64)
    sketches = sketches.reshape(len(sketches), len(layers), 8, 8)
    directions = np.concatenate([fold_directions(spec, plan, store, layers, one[None])[0] for one in sketches])
    pairs = table_of(manifest, "targets")
    named = [row.get("set") for row in pairs]
    factors = [row["weight"] / named.count(row.get("set")) for row in pairs]
    for number, name in enumerate(named):
        weight, sign = SIGNED.get(name, (1.0, 1))
        factors[number] *= weight * sign
    directions = directions * np.array(factors)[:, None]

    of_units = [shards.read_shard(store, plan.extractor, "candidates", unit.id).arrays for unit in plan.candidates]
    decode = codec.decode_sign if spec.extraction.codec.kind == "sign" else codec.decode_float16
    rows = np.concatenate([decode(arrays) for arrays in of_units]).astype(np.float64)
    if spec.scoring.score == "cosine":
        divisor = np.concatenate([arrays["norm"] for arrays in of_units]).astype(np.float64)
    elif spec.scoring.loss == "mean":
        divisor = np.concatenate([arrays["tokens"] for arrays in of_units]).astype(np.float64)
    else:
        divisor = np.ones(len(rows))
    rows = rows / np.where(divisor > 0, divisor, 1)[:, None]
    sum_of_norms = np.linalg.norm(directions, axis=1).sum()
    return rows @ directions.T, np.linalg.norm(rows, axis=1) * sum_of_norms


SCORINGS: list[Row] = [
    {},
    {"curvature": {"kind": "none"}, "loss": "mean"},
    {"score": "cosine", "weighting": "uniform"},
]


@pytest.mark.parametrize(("kind", "with_sets"), [("sign", True), ("float16", False)])
def test_contributions_of_every_row_add_up_to_its_score(job: Job, kind: str, with_sets: bool) -> None:
    job.use_codec(kind)
    if with_sets:
        use_sets(job)
    for scoring in SCORINGS:
        job.spec["scoring"] = scoring
        manifest = job.run()
        scores = table_of(manifest, "scores")
        ids = [row["example_id"] for row in scores if row["score"] is not None]
        facts = job.passes("explain", str(manifest), *ids, "--pairs", "0")
        wanted_NQ, size_N = of_each_pair_alone(job, manifest)
        # A direction is rounded to 24 bits: a score along it is off by 2^-20 |row| |direction| at most (`SignScorer`), and
        # the directions of all pairs bound that of their sum. Decoded rows are float32: 2^-24 of each number.
        # float16 rows are not rounded again, so that only the sums in float64 differ.
        bound_N = size_N * (2 * 2.0**-20 + 2.0**-23 if kind == "sign" else 2.0**-23)
        first_row = {row["example_id"]: place for place, row in reversed(list(enumerate(scores)))}
        assert [it["example_id"] for it in facts["examples"]] == list(dict.fromkeys(ids))
        for explained in facts["examples"]:
            place = first_row[explained["example_id"]]
            of_pairs = {it["pair"]: it["contribution"] for it in explained["pairs"]}
            assert explained["others"] == {"pairs": 0, "contribution": 0.0}
            found_Q = np.array([of_pairs[number + 1] for number in range(wanted_NQ.shape[1])])
            assert np.abs(found_Q - wanted_NQ[place]).max() <= bound_N[place]
            assert abs(found_Q.sum() - scores[place]["score"]) <= bound_N[place]
            assert explained["score"] == scores[place]["score"]
            assert (explained["source"], explained["line"]) == (scores[place]["source"], scores[place]["line"])
            for of_set in explained.get("sets", []):
                members = [
                    number for number, row in enumerate(table_of(manifest, "targets")) if row["set"] == of_set["set"]
                ]
                # The sum of the set's published score, by its sign and weight, within the same bound.
                weight, sign = SIGNED[of_set["set"]]
                assert of_set["contribution"] == pytest.approx(found_Q[members].sum(), rel=1e-12, abs=1e-300)
                published = weight * sign * scores[place][f"score_{of_set['set']}"]
                assert abs(of_set["contribution"] - published) <= bound_N[place]


def test_an_example_is_named_by_its_id_by_the_beginning_of_it_or_as_it_is_printed(job: Job) -> None:
    use_sets(job)
    manifest = job.run()
    scores = table_of(manifest, "scores")
    row = scores[5]
    printed = explain_text(job.passes("explain", str(manifest), row["example_id"])).splitlines()[0].split("  ")
    assert printed[-2:] == [row["example_id"], f"{row['source']}:6"]
    for name in (*printed[-2:], row["example_id"][:12]):
        (found,) = job.passes("explain", str(manifest), name)["examples"]
        assert {each: found[each] for each in ("example_id", "source", "line", "score")}.items() <= row.items()
    assert len(job.passes("explain", str(manifest), *printed[-2:])["examples"]) == 1, "two names of one row"
    repeats = scores[9]
    (found,) = job.passes("explain", str(manifest), f"{repeats['source']}:{repeats['line']}")["examples"]
    assert (found["example_id"], found["line"]) == (scores[3]["example_id"], 10), (
        "the row that is named, if it repeats another"
    )
    ids = {each["example_id"] for each in scores}
    first = max("0123456789abcdef", key=lambda letter: sum(example_id.startswith(letter) for example_id in ids))
    number = sum(example_id.startswith(first) for example_id in ids)
    assert number > 1
    job.refuses(("explain", str(manifest), first), 64, f"{number} example ids begin with '{first}'", "more of the id")
    for name in (f"{row['source']}:99", f"{row['source']}:{2**64}", "elsewhere.jsonl:6", row["source"], ""):
        job.refuses(("explain", str(manifest), name), 64, f"no candidate has the example id or the FILE:LINE '{name}'")


def test_the_largest_pairs_are_listed_with_both_texts_and_the_rest_is_summed(job: Job) -> None:
    use_sets(job)
    manifest = job.run()
    whole = job.passes("explain", str(manifest), "--top", "2", "--bottom", "1", "--pairs", "0")
    facts = job.passes("explain", str(manifest), "--top", "2", "--bottom", "1", "--pairs", "2")
    ranked = sorted(
        (row for row in table_of(manifest, "scores") if row["score"] is not None and not row["duplicate"]),
        key=lambda row: row["score"],
    )
    ends = [ranked[-1], ranked[-2], ranked[0]]
    assert [it["example_id"] for it in facts["examples"]] == [row["example_id"] for row in ends]
    lines = (job.folder / "pool" / "a.jsonl").read_text().splitlines()
    for example, every, row in zip(facts["examples"], whole["examples"], ends, strict=True):
        largest = sorted(every["pairs"], key=lambda it: -abs(it["contribution"]))
        assert example["pairs"] == largest[:2]
        rest = sum(it["contribution"] for it in largest[2:])
        assert example["others"]["pairs"] == 3
        assert example["others"]["contribution"] == pytest.approx(rest)
        assert example["text"].split("assistant: ")[1] in lines[row["line"] - 1]
    named = {it["pair"]: it for it in facts["pairs"]}
    assert named.keys() == {it["pair"] for example in facts["examples"] for it in example["pairs"]}
    for number, it in named.items():
        row = table_of(manifest, "targets")[number - 1]
        assert {name: it[name] for name in ("example_id", "set", "preference", "weight")}.items() <= row.items()
        assert f"Capital of {number - 1}?" in it["text"]


def test_the_report_shows_the_two_strongest_pairs_of_each_of_its_examples(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_sets(job)
    manifest = job.run()
    words = words_of(manifest)
    facts = job.passes("explain", str(manifest), "--top", "9", "--bottom", "9", "--pairs", "2")
    shown = re.findall(r"pair (\d+): ([^ ]+) \(([^ ]+) % of the score\): prompt:", words)
    wanted = [(example, each) for example in facts["examples"] for each in example["pairs"]]
    assert [int(number) for number, _, _ in shown] == [each["pair"] for _, each in wanted]
    for (_, _, percent), (example, each) in zip(shown, wanted, strict=True):
        share = 100 * each["contribution"] / example["score"]
        assert abs(float(percent.replace("−", "-").replace(",", "")) - share) < 0.051  # printed with one digit

    monkeypatch.setattr("prism_job.score.contributions.MAX_PAIRS_IN_REPORT", 4)
    job.spec["selection"]["budget"] = {"count": 3}
    assert "of the score)" not in words_of(job.run())


def test_a_pair_names_the_examples_that_it_raises_and_lowers_most(job: Job) -> None:
    use_sets(job)
    manifest = job.run()
    scores = table_of(manifest, "scores")
    ids = [row["example_id"] for row in scores if row["score"] is not None and not row["duplicate"]]
    every = job.passes("explain", str(manifest), *ids, "--pairs", "0")["examples"]
    for number in (2, 5):
        facts = job.passes("explain", str(manifest), "--pair", str(number), "--top", "3", "--bottom", "2")
        of_pair = {
            it["example_id"]: next(each["contribution"] for each in it["pairs"] if each["pair"] == number)
            for it in every
        }
        rising = sorted(of_pair, key=lambda example_id: of_pair[example_id])
        assert [it["example_id"] for it in facts["for"]] == rising[::-1][:3]
        assert [it["example_id"] for it in facts["against"]] == rising[:2]
        for it in (*facts["for"], *facts["against"]):
            assert it["contribution"] == of_pair[it["example_id"]]  # one row's result does not depend on its neighbours
        assert facts["pair"]["pair"] == number
        assert f"Capital of {number - 1}?" in facts["pair"]["text"]


def test_only_the_units_of_the_examples_are_read(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = job.run()
    read: list[tuple[str, str]] = []
    plain = shards.read_shard

    def watched(store: Any, extractor: str, kind: Any, unit_id: str) -> Any:
        read.append((kind, unit_id))
        return plain(store, extractor, kind, unit_id)

    monkeypatch.setattr(shards, "read_shard", watched)
    job.passes("explain", str(manifest), table_of(manifest, "scores")[5]["example_id"])
    plan = job.planned()
    assert {unit for kind, unit in read if kind == "candidates"} == {plan.candidates[1].id}


def test_what_cannot_be_explained_is_refused(job: Job) -> None:
    use_sets(job)
    manifest = job.run()
    without = next(row["example_id"] for row in table_of(manifest, "scores") if row["score"] is None)
    job.refuses(("explain", str(manifest), "0" * 32), 64, "no candidate has the example id", "scores.parquet")
    job.refuses(("explain", str(manifest), without), 64, "has no score", "quarantine.jsonl")
    job.refuses(("explain", str(manifest)), 64, "--top")
    job.refuses(("explain", str(manifest), "--pair", "6"), 64, "no target pair 6", "from 1 to 5")
    key = shards.shard_key(job.planned().extractor, "candidates", job.planned().candidates[0].id)
    (job.folder / "store" / key).unlink()
    job.refuses(("explain", str(manifest), "--top", "99"), 65, "missing shard")
    assert read_json(manifest)["counts"]["target_pairs"] == 5
