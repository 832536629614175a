"""The whole job against an oracle that begins at the text: tokens and mask by hand, gradients by autograd, all in float64.

Nothing the job stored is an input of the oracle, so a wrong mask, sign, mean, fold, factor or formula anywhere between
the data file and scores.parquet is seen here.

Shapes: N candidates, Q pairs, L layers, P projected dims a side, M = P², D folded dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from prism_job.extract.tokenise import Encoded
from prism_job.store import codec, shards
from tests.conftest import Job, turn, write_jsonl
from tests.models import build_model, build_tokenizer
from tests.oracle import factor_sums, linear_layers, sketch_matrix, sketches, weight_gradients

DIM, SEED, FOLD_DIMS, DAMPING = 8, 0, 512, 0.1
END = 2
"""<|im_end|>, the tokenizer's end of text."""

Piece = tuple[str, bool]
"""Text, and whether it carries loss."""
Float64 = NDArray[np.float64]


def chat(*messages: tuple[str, str], first: int = 0) -> tuple[list[dict[str, str]], list[Piece]]:
    """Messages, and the pieces they become: loss on what follows an assistant's header, from message `first` on."""
    pieces = []
    for place, (role, content) in enumerate(messages):
        pieces.append((f"<|im_start|>{role}\n", False))
        pieces.append((f"{content}<|im_end|>\n", role == "assistant" and place >= first))
    return [turn(role, content) for role, content in messages], pieces


def candidates() -> tuple[list[dict[str, Any]], list[list[Piece]]]:
    """Rows of every convention, and their pieces. Plain text ends with the tokenizer's end of text."""
    end = ("<|im_end|>", True)
    one, one_pieces = chat(("user", "What is the capital of France?"), ("assistant", "The capital of France is Paris."))
    two, two_pieces = chat(
        ("system", "You are short."),
        ("user", "Seven and eight?"),
        ("assistant", "Fifteen, naïvely: 七 + 八."),
        ("user", "And twelve?"),
        ("assistant", "Twenty-seven."),
    )
    asked, asked_pieces = chat(("user", "Spain?"), ("assistant", "Madrid."), ("user", "Italy?"))
    told, told_pieces = chat(("assistant", "Rome is the capital of Italy."))
    # A completion that begins within a word of the prompt: the token at the seam carries loss, as the model would see it.
    rows = [
        {"messages": one, "label": 1},
        {"messages": two},
        {"prompt": asked, "completion": told},
        {"prompt": "What is the capital of Spain?", "completion": " The capital of Spain is Madrid."},
        {"text": "Seven and eight make fifteen."},
        {"prompt": "", "completion": "Oslo"},
    ]
    pieces = [
        one_pieces,
        two_pieces,
        [(text, False) for text, _ in asked_pieces] + told_pieces,
        [("What is the capital of Spain?", False), (" The capital of Spain is Madrid.", True), end],
        [("Seven and eight make fifteen.", True), end],
        [("Oslo", True), end],
    ]
    return rows, pieces


def pairs() -> tuple[list[dict[str, Any]], list[tuple[list[Piece], list[Piece]]]]:
    """Target rows, and the pieces of (chosen, rejected)."""
    rows, pieces = [], []
    for country, right, wrong in (
        ("France", "Paris", "Rome or so"),
        ("Norway", "Oslo", "Madrid"),
        ("Spain", "Madrid", "Oslo"),
    ):
        question = ("user", f"What is the capital of {country}?")
        sides = [chat(question, ("assistant", f"{city}.")) for city in (right, wrong)]
        prompt = sides[0][0][:1]
        rows.append({"prompt": prompt, "chosen": sides[0][0][1:], "rejected": sides[1][0][1:]})
        pieces.append((sides[0][1], sides[1][1]))
    rows.append({"prompt": "Seven and eight make", "chosen": " fifteen.", "rejected": " twenty-one."})
    for_text = [
        [("Seven and eight make", False), (text, True), ("<|im_end|>", True)] for text in (" fifteen.", " twenty-one.")
    ]
    pieces.append((for_text[0], for_text[1]))
    return rows, pieces


def encoded(pieces: list[Piece]) -> Encoded:
    """Tokens piece by piece; that they are the tokens of the whole is checked."""
    tokenizer = build_tokenizer()
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in pieces]
    ids = [token for part in parts for token in part]
    assert ids == tokenizer("".join(text for text, _ in pieces), add_special_tokens=False)["input_ids"]
    supervised = [loss for part, (_, loss) in zip(parts, pieces, strict=True) for _ in part]
    return Encoded(ids, [False, *supervised[1:]])


@dataclass(frozen=True)
class Known:
    """What the oracle knows of one text: its unfolded row, summed NLL and number of supervised tokens."""

    row_LM: Float64
    nll: float
    tokens: int


@dataclass(frozen=True)
class Oracle:
    names: list[str]
    candidates: list[Known]
    chosen: list[Known]
    rejected: list[Known]
    inputs_LPP: Float64
    outputs_LPP: Float64
    num_tokens: int


@cache
def oracle() -> Oracle:
    model = build_model("llama", torch.float64)

    def known(pieces: list[Piece], *, mean: bool) -> Known:
        gradients, nll, tokens = weight_gradients(model, encoded(pieces), mean=mean)
        return Known(torch.stack(list(sketches(gradients, SEED, DIM).values())).numpy(), nll, tokens)

    texts = candidates()[1]
    factors = factor_sums(model, [encoded(pieces) for pieces in texts], SEED, DIM)
    return Oracle(
        list(linear_layers(model)),
        [known(pieces, mean=False) for pieces in texts],
        [known(chosen, mean=True) for chosen, _ in pairs()[1]],
        [known(rejected, mean=True) for _, rejected in pairs()[1]],
        factors.inputs_LPP.numpy(),
        factors.outputs_LPP.numpy(),
        factors.num_tokens,
    )


def fold(row_LM: Float64) -> Float64:
    return sum(
        part @ sketch_matrix(SEED, DIM, name, FOLD_DIMS).numpy()
        for name, part in zip(oracle().names, row_LM, strict=True)
    )


def direction(weighting: str, curvature: str) -> Float64:
    """(H + λI)⁻¹ g [L, M] by dense matrices, a layer at a time (docs/architecture.md, Method)."""
    known = oracle()
    g_LM = np.zeros_like(known.candidates[0].row_LM)
    for chosen, rejected in zip(known.chosen, known.rejected, strict=True):
        likely = [np.exp(-side.nll / side.tokens) for side in (chosen, rejected)]
        weight = likely[0] / sum(likely) if weighting == "preference" else 1.0
        g_LM += weight * (chosen.row_LM - rejected.row_LM) / len(known.chosen)
    if curvature == "none":
        return g_LM
    layers = zip(known.outputs_LPP / known.num_tokens, known.inputs_LPP / known.num_tokens, strict=True)
    curvatures = [np.kron(outputs, inputs) for outputs, inputs in layers]
    lam = DAMPING * np.mean([np.trace(one) / DIM**2 for one in curvatures])
    return np.stack([np.linalg.solve(one + lam * np.eye(DIM**2), g) for one, g in zip(curvatures, g_LM, strict=True)])


def job_over_all_conventions(job: Job, kind: str) -> Job:
    (job.folder / "pool" / "a.jsonl").unlink()
    write_jsonl(job.folder / "pool" / "all.jsonl", candidates()[0])
    write_jsonl(job.folder / "targets.jsonl", pairs()[0])
    job.use_codec(kind)
    return job


def stored(job: Job, kind: shards.Kind) -> list[dict[str, NDArray[Any]]]:
    units = [(extractor, unit) for extractor, found, unit in job.shards() if found == kind]
    return [shards.read_shard(job.store(), extractor, kind, unit).arrays for extractor, unit in units]


def joined(parts: list[dict[str, NDArray[Any]]], name: str) -> NDArray[Any]:
    return np.concatenate([part[name] for part in parts])


FLOAT32 = 1e-5
"""Of a row's norm: rounding of 6e-8 an operation through two layers, 3e-6 seen (as in test_gradients)."""


def close(found_ND: NDArray[Any], wanted_ND: Float64, tolerance: float = FLOAT32) -> None:
    found_ND, wanted_ND = found_ND.reshape(len(wanted_ND), -1), wanted_ND.reshape(len(wanted_ND), -1)
    deviation_N = np.linalg.norm(found_ND - wanted_ND, axis=1) / np.linalg.norm(wanted_ND, axis=1)
    assert (deviation_N < tolerance).all(), deviation_N


def test_shards_hold_what_the_oracle_computes_from_the_text(job: Job) -> None:
    """Rows, pairs, NLLs, token counts, norms and factors of every convention, from text to shard."""
    known = oracle()
    job_over_all_conventions(job, "float16").run()
    rows = stored(job, "candidates")
    wanted_NLM = np.stack([one.row_LM for one in known.candidates])
    # float16 relative to the row's largest value: 5e-4 of each value at most.
    close(np.concatenate([codec.decode_float16(part) for part in rows]), wanted_NLM, 5e-4)
    assert joined(rows, "tokens").tolist() == [one.tokens for one in known.candidates]
    np.testing.assert_allclose(joined(rows, "nll"), [one.nll for one in known.candidates], rtol=FLOAT32)
    np.testing.assert_allclose(joined(rows, "norm"), np.linalg.norm(wanted_NLM, axis=(1, 2)), rtol=FLOAT32)

    targets = stored(job, "targets")
    close(
        joined(targets, "rows"),
        np.stack([good.row_LM - bad.row_LM for good, bad in zip(known.chosen, known.rejected, strict=True)]),
    )
    for side, wanted in (("chosen", known.chosen), ("rejected", known.rejected)):
        assert joined(targets, f"{side}_tokens").tolist() == [one.tokens for one in wanted]
        np.testing.assert_allclose(joined(targets, f"{side}_nll"), [one.nll for one in wanted], rtol=FLOAT32)

    upper = np.triu_indices(DIM)
    for name, wanted_LPP in (("inputs", known.inputs_LPP), ("outputs", known.outputs_LPP)):
        close(sum(part[name] for part in stored(job, "factors")), wanted_LPP[:, *upper])


SCORINGS = [
    {"weighting": weighting, "curvature": {"kind": curvature, "damping": DAMPING}, **form}
    for weighting in ("preference", "uniform")
    for curvature in ("kfac", "none")
    for form in ({"score": "influence", "loss": "sum"}, {"score": "influence", "loss": "mean"}, {"score": "cosine"})
]


def wanted_scores(kind: str, scoring: dict[str, Any]) -> tuple[Float64, Float64]:
    """Scores by the oracle [N], and what rounding may change in each."""
    solved_LM = direction(scoring["weighting"], scoring["curvature"]["kind"])
    scores, slack = [], []
    for one in oracle().candidates:
        divisor = np.linalg.norm(one.row_LM) if scoring["score"] == "cosine" else 1.0
        divisor = one.tokens if scoring.get("loss") == "mean" else divisor
        if kind == "float16":
            raw, spread = float((one.row_LM * solved_LM).sum()), np.abs(one.row_LM * solved_LM).sum() * 5e-4
        else:
            row_D, solved_D = fold(one.row_LM), fold(solved_LM)
            scale_D = np.repeat(np.abs(row_D).reshape(-1, codec.BLOCK).mean(axis=1), codec.BLOCK)
            parts_D = np.where(row_D >= 0, 1.0, -1.0) * scale_D * solved_D
            # A dim within float32's rounding of zero may have either sign; scales are float16.
            near_zero_D = np.abs(row_D) < 1e-4 * scale_D
            raw, spread = parts_D.sum(), np.abs(parts_D).sum() * 5e-4 + 2 * np.abs(parts_D[near_zero_D]).sum()
        scores.append(raw / divisor)
        slack.append(spread / divisor)
    return np.array(scores), np.array(slack)


@pytest.mark.parametrize("kind", ["sign", "float16"])
def test_every_score_equals_the_oracles_formula(job: Job, kind: str) -> None:
    job_over_all_conventions(job, kind)
    for scoring in SCORINGS:
        job.spec["scoring"] = scoring
        manifest = job.run()
        found = pq.read_table(manifest.parent / "scores.parquet")["score"].to_numpy()
        wanted, slack = wanted_scores(kind, scoring)
        assert (np.abs(found - wanted) <= slack).all(), (scoring, found, wanted, slack)
        # Small beside what is compared: a wrong mask, sign, mean or formula is an error of order one.
        assert np.median(slack / np.abs(wanted)) < 0.05
