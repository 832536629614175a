"""How alike are the stored rows of copies, edited rows, paraphrases and unrelated rows, and what `dedupe: near` leaves of them.

The pool is 30 rows of each task of `forward.py`. Copies of its rows are made by rule: white space, other words, another order
of the sentences, other names, other numbers. The first table is the agreement of the signs of a row and its copy, and of
unrelated rows; the second the nearest other row of the same task. Then a tenth of the pool gets a copy (exact, white space,
other words), and 5 % are kept for one family of tasks: how many of them are copies of another kept row?

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

NUM_EDITED, ROWS_A_TASK = 20, 30
"""Rows of each kind (GSM8K, the family, other tasks) that are compared with their copies; rows of a task in the pool."""
FAMILY, COPIED, BUDGETS = "numbers", 0.1, (0.05, 0.2)
"""The family of tasks that is selected for; copies as a share of the pool; what is kept."""
LIMITS = (0.8, 0.85, 0.9, 0.95)

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
    return {**row, "prompt": row["prompt"].replace(" ", "  ", 1)}


def trailing(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "completion": row["completion"] + " "}


def introduced(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "prompt": "Please answer this. " + row["prompt"]}


def reworded(row: dict[str, Any]) -> dict[str, Any]:
    changed = dict(row)
    for word, other in WORDS:
        for side in ("prompt", "completion"):
            changed[side] = re.sub(rf"\b{word}\b", other, changed[side])
    return introduced(changed)


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
    "one space more in the prompt": spaced,
    "a space after the response": trailing,
    "a sentence before the prompt": introduced,
    "sentences of the prompt in another order": reordered,
    "prompt in other words": prompt_reworded,
    "prompt and response in other words": reworded,
    "other names": renamed,
    "other numbers": renumbered,
}


def main() -> None:
    options = harness.parser(__doc__, seeds=1).parse_args()
    whole = forward.read_pool(options.data)
    family = forward.Family(options.work, options.model, whole, FAMILY, 0, "own")
    by_task: dict[str, Rows] = {}
    for row, is_in in zip(whole, family.in_pool_N, strict=True):
        if is_in:
            by_task.setdefault(row["task"], []).append(row)
    pool = [row for rows in by_task.values() for row in rows[:ROWS_A_TASK]]
    copies, copy_of, edit_of = edited(pool)
    found = harness.extract(
        options.work,
        "near-duplicates",
        pool + copies,
        family.pairs(),
        model=options.model,
        dtype="bfloat16",
        extraction={"examplesPerShard": 128},
    )
    signs_NW = found.signs_NW
    figures = edits(pool, signs_NW, copy_of, edit_of) | tasks(pool, signs_NW)
    scores_N = found.scores(found.targets.preference_Q)
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
        places = [place for place, row in enumerate(pool) if row["task"] == task]
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
    """A tenth of the pool gets a copy, half of them of the family: exact, one space more, or in other words."""
    chance = random.Random(1)
    in_family = [row["task"] in forward.FAMILIES[FAMILY] for row in pool]
    copied = ("one space more", "prompt and response in other words")
    possible = [(place, place) for place in sorted({*copy_of})]
    edits = enumerate(zip(copy_of, edit_of, strict=True), len(pool))
    possible += [(row, place) for row, (place, edit) in edits if edit.startswith(copied)]
    chosen: list[tuple[int, int]] = []
    for wanted in (True, False):
        of_kind = [one for one in possible if in_family[one[1]] == wanted]
        chosen += chance.sample(of_kind, round(COPIED / 2 * len(pool)))
    rows = [*range(len(pool)), *(row for row, _ in chosen)]
    origin = np.array([*range(len(pool)), *(place for _, place in chosen)])
    figures: dict[str, float] = {"copies": len(chosen), "rows": len(rows)}
    lines = []
    for budget in BUDGETS:
        for limit in (None, *LIMITS):
            # Exact copies have ids of their own here, so that `near` alone finds them.
            rule = {"dedupe": "near", "nearAgreement": limit} if limit else {}
            selection = {"keep": "highest", "budget": {"count": round(budget * len(rows))}, **rule}
            outcome = harness.selected(scores_N[rows], selection, signs_NW[rows])
            kept = outcome.order.astype(np.int64)
            repeats, repeated = outcome.near or (kept[:0], kept[:0])
            found = {
                "kept": len(kept),
                "copies": len(kept) - len({*origin[kept].tolist()}),
                "left_out": len(repeats),
                "no_copies": int((origin[repeats] != origin[repeated]).sum()),
                "family": int(np.array(in_family)[origin[kept]].sum()),
            }
            name = f"{budget:.0%}, {f'near at {limit:g}' if limit else 'all rows count'}"
            lines.append([name, *found.values()])
            figures |= {f"{name}/{key}": value for key, value in found.items()}
    heads = ["kept", "rows", "copies of another kept row", "left out", "of them no copies", "of the family"]
    print(harness.table(heads, lines))
    return figures


def agreement(one_NW: NDArray[np.uint8], other_MW: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Share of signs that are equal, of every pair: float64 [N, M]."""
    bits = [2.0 * np.unpackbits(signs, axis=1).astype(np.float32) - 1 for signs in (one_NW, other_MW)]
    product: NDArray[np.float64] = bits[0] @ bits[1].T / bits[0].shape[1]
    return (1 + product.astype(np.float64)) / 2


if __name__ == "__main__":
    main()
