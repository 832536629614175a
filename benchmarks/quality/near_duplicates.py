"""How alike are the stored rows of copies, edited rows, paraphrases and unrelated rows, and what `dedupe: near` leaves of them.

The pool is that of `forward.py`. Copies of its rows are made by rule: white space, other words, other order of the sentences,
other names, other numbers. The first table is the agreement of the signs of a row and its copy, and of unrelated rows. Then a
tenth of the pool gets a copy (exact, white space, other words), and 5 % are kept for one family of tasks: how many of
them are copies of another kept row?

    python -m benchmarks.quality.near_duplicates --data FOLDER --model model.gguf --json near_duplicates.json

Shapes: N rows, W bytes of signs.
"""

import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import job
from benchmarks.quality import forward, harness
from benchmarks.quality.harness import Rows

NUM_EDITED = 40
"""Rows of each kind (GSM8K, the family, other tasks) that are compared with their copies."""
FAMILY, COPIED, BUDGET = "numbers", 0.1, 0.05
"""The family of tasks that is selected for; copies as a share of the pool; what is kept."""
LIMITS = (0.85, 0.9, 0.95)

WORDS = (
    ("How many", "What number of"),
    ("how many", "what number of"),
    ("How much", "What amount of"),
    ("bought", "purchased"),
    ("buys", "purchases"),
    ("sold", "traded"),
    ("each", "every"),
    ("total", "whole"),
    ("altogether", "in all"),
    ("also", "as well"),
    ("wants to", "would like to"),
    ("has", "owns"),
    ("does", "will"),
    ("If", "Suppose"),
    ("Is", "Would you say that"),
    ("the following", "this"),
    ("and", "and then"),
)
NAMES = ("Ravi", "Ines", "Tomas", "Yuki", "Olga")


def spaced(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "prompt": " " + row["prompt"].replace(" ", "  ", 3), "completion": row["completion"] + " "}


def reworded(row: dict[str, Any]) -> dict[str, Any]:
    changed = dict(row)
    for word, other in WORDS:
        for side in ("prompt", "completion"):
            changed[side] = re.sub(rf"\b{word}\b", other, changed[side])
    return {**changed, "prompt": "Please answer this. " + changed["prompt"]}


def prompt_reworded(row: dict[str, Any]) -> dict[str, Any]:
    return {**reworded(row), "completion": row["completion"]}


def reordered(row: dict[str, Any]) -> dict[str, Any]:
    first, *rest = re.split(r"(?<=[.?!]) ", row["prompt"].strip())
    return {**row, "prompt": " ".join([*rest, first]) + "\n"}


def renamed(row: dict[str, Any]) -> dict[str, Any]:
    """Words with a capital letter that do not only begin a sentence or line become other names."""
    text = row["prompt"] + row["completion"]
    found = dict.fromkeys(re.findall(r"(?<=[a-z,] )[A-Z][a-z]+\b", text))
    starts = re.findall(r"\b[A-Z][a-z]+(?='s)", text)
    changed = dict(row)
    for number, name in enumerate(dict.fromkeys([*found, *starts])):
        for side in ("prompt", "completion"):
            changed[side] = re.sub(rf"\b{name}\b", NAMES[number % len(NAMES)], changed[side])
    return changed


def renumbered(row: dict[str, Any]) -> dict[str, Any]:
    changed = {
        side: re.sub(r"\d+", lambda found: str(int(found[0]) + 1), row[side]) for side in ("prompt", "completion")
    }
    return {**row, **changed}


EDITS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "white space": spaced,
    "prompt in another order": reordered,
    "prompt in other words": prompt_reworded,
    "both sides in other words": reworded,
    "other names": renamed,
    "other numbers": renumbered,
}


def main() -> None:
    options = harness.parser(__doc__, seeds=1).parse_args()
    whole = forward.read_pool(options.data)
    family = forward.Family(options.work, options.model, whole, FAMILY, 0, "own")
    pool = [row for row, is_in in zip(whole, family.in_pool_N, strict=True) if is_in]
    copies, copy_of, edit_of = edited(pool)
    found = harness.extract(
        options.work,
        "near-duplicates",
        whole + copies,  # so that its units are those of forward.py
        family.pairs(),
        model=options.model,
        dtype="bfloat16",
        extraction={"examplesPerShard": 256},
    )
    rows = np.array([*np.flatnonzero(family.in_pool_N), *range(len(whole), len(whole) + len(copies))])
    signs_NW = found.signs_NW[rows]
    figures = edits(pool, signs_NW, copy_of, edit_of) | tasks(pool, signs_NW)
    scores_N = found.scores(found.targets.preference_Q)[rows]
    figures |= selections(pool, signs_NW, copy_of, edit_of, scores_N)
    job.write_json(options.json, figures)


def edited(pool: Rows) -> tuple[Rows, list[int], list[str]]:
    """Copies of some rows, one for each edit that changes the row; the row that each is a copy of; and the edit."""
    chance = random.Random(0)
    family = set(forward.FAMILIES[FAMILY])
    kinds = {
        "GSM8K": [place for place, row in enumerate(pool) if row["task"] == "gsm8k"],
        "the family": [place for place, row in enumerate(pool) if row["task"] in family],
        "other tasks": [place for place, row in enumerate(pool) if row["task"] not in {"gsm8k", *family}],
    }
    copies: Rows = []
    copy_of, edit_of = [], []
    for kind, places in kinds.items():
        for place in chance.sample(places, NUM_EDITED):
            for edit, change in EDITS.items():
                copy = change(pool[place])
                if (copy["prompt"], copy["completion"]) != (pool[place]["prompt"], pool[place]["completion"]):
                    copies.append(copy)
                    copy_of.append(place)
                    edit_of.append(f"{edit} ({kind})")
    return copies, copy_of, edit_of


def edits(pool: Rows, signs_NW: NDArray[np.uint8], copy_of: list[int], edit_of: list[str]) -> dict[str, float]:
    chance = random.Random(0)
    pairs: dict[str, list[tuple[int, int]]] = {}
    for number, (place, edit) in enumerate(zip(copy_of, edit_of, strict=True)):
        pairs.setdefault(edit, []).append((place, len(pool) + number))
    drawn = [(chance.randrange(len(pool)), chance.randrange(len(pool))) for _ in range(4000)]
    drawn = [(one, other) for one, other in drawn if one != other]
    task_of = [row["task"] for row in pool]
    pairs["another row of GSM8K"] = [pair for pair in drawn if {task_of[place] for place in pair} == {"gsm8k"}]
    pairs["a row of another task"] = [(one, other) for one, other in drawn if task_of[one] != task_of[other]]
    figures, lines = {}, []
    for name, of_kind in pairs.items():
        agreements = [agreement(signs_NW[[one]], signs_NW[[other]])[0, 0] for one, other in of_kind]
        points = dict(zip(("p5", "median", "p95"), np.quantile(agreements, [0.05, 0.5, 0.95]).tolist(), strict=True))
        lines.append([name, len(of_kind), *(f"{point:.3f}" for point in points.values())])
        figures |= {f"{name}/{key}": point for key, point in points.items()}
    print(harness.table(["a row and its copy", "pairs", "5 %", "median", "95 %"], lines), end="\n\n")
    return figures


def tasks(pool: Rows, signs_NW: NDArray[np.uint8]) -> dict[str, float]:
    """Different rows of one task: how alike is the nearest?"""
    figures, lines = {}, []
    for task in sorted({row["task"] for row in pool}):
        places = [place for place, row in enumerate(pool) if row["task"] == task][:120]
        agreements_NN = agreement(signs_NW[places], signs_NW[places])
        np.fill_diagonal(agreements_NN, np.nan)
        nearest = np.nanmax(agreements_NN, axis=1)
        found = {"median": float(np.nanmedian(agreements_NN)), "nearest_median": float(np.median(nearest))}
        found |= {f"nearest_above_{limit:g}": float((nearest >= limit).mean()) for limit in LIMITS}
        lines.append([task, len(places), *(f"{value:.3f}" for value in found.values())])
        figures |= {f"{task}/{name}": value for name, value in found.items()}
    heads = ["task", "rows", "median pair", "median nearest row", *(f"nearest ≥ {limit:g}" for limit in LIMITS)]
    print(harness.table(heads, lines), end="\n\n")
    return figures


def selections(
    pool: Rows, signs_NW: NDArray[np.uint8], copy_of: list[int], edit_of: list[str], scores_N: harness.Float64
) -> dict[str, float]:
    """A tenth of the pool gets a copy: exact, by white space, in other words. What does each setting keep of them?"""
    chance = random.Random(1)
    wanted = [number for number, edit in enumerate(edit_of) if edit.startswith(("white space", "both sides"))]
    exact = sorted({*copy_of})
    num_copies = round(COPIED * len(pool))
    chosen = chance.sample(
        [("exact", place) for place in exact] + [("edited", number) for number in wanted], num_copies
    )
    rows = [*range(len(pool)), *(one if kind == "exact" else len(pool) + one for kind, one in chosen)]
    origin = np.array([*range(len(pool)), *(one if kind == "exact" else copy_of[one] for kind, one in chosen)])
    family_N = np.array([pool[place]["task"] in forward.FAMILIES[FAMILY] for place in origin])
    figures: dict[str, float] = {"copies": num_copies, "rows": len(rows)}
    lines = []
    settings = [("none", None), *(("near", limit) for limit in LIMITS)]
    for dedupe, limit in settings:
        selection = {"keep": "highest", "budget": {"count": round(BUDGET * len(rows))}, "dedupe": dedupe}
        selection |= {"nearAgreement": limit} if limit else {}
        outcome = harness.selected(scores_N[rows], selection, signs_NW[rows])
        kept = outcome.order.astype(np.int64)
        repeated = len(kept) - len({*origin[kept].tolist()})
        wrongly = 0
        if outcome.near:
            wrongly = int((origin[outcome.near[0]] != origin[outcome.near[1]]).sum())
        # Exact copies have other ids here, so `exact` would be `none`.
        name = dedupe if limit is None else f"near, {limit:g}"
        lines.append(
            [name, len(kept), repeated, len(outcome.near[0]) if outcome.near else 0, wrongly, int(family_N[kept].sum())]
        )
        figures |= dict(
            zip(
                (f"{name}/{key}" for key in ("kept", "copies", "left_out", "no_copies", "family")),
                lines[-1][1:],
                strict=True,
            )
        )
    heads = [
        "dedupe",
        "kept",
        "of them copies of another kept row",
        "near-duplicates left out",
        "of them no copies",
        "of the family",
    ]
    print(harness.table(heads, lines))
    return figures


def agreement(one_NW: NDArray[np.uint8], other_MW: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Share of signs that are equal, of every pair: float64 [N, M]."""
    bits = [2.0 * np.unpackbits(signs, axis=1).astype(np.float32) - 1 for signs in (one_NW, other_MW)]
    product: NDArray[np.float64] = bits[0] @ bits[1].T / bits[0].shape[1]
    return (1 + product.astype(np.float64)) / 2


if __name__ == "__main__":
    main()
