"""The rows of two scores.parquet joined by example id, part by part of the ids. Does not know manifests or what was asked for.

Memory does not grow with the rows: example ids are digests, so their first bits cut both tables into equal parts, and each
pass over the files keeps one part. An id counts once in a table, selected if one of its rows is.

Shapes: O, N rows of a part in the old and in the new table; C examples of both; S sources of either.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prism_job.evaluate.audit import spearman

PART_ROWS = 2**21
"""Rows of both tables together in memory at a time: about 300 MB. The rank correlation of longer tables rests on their first
part, a sample of the ids: its standard error is below .001."""

MIN_CORRELATED = 3
"""Fewer common rows have no rank correlation."""

NUM_SHOWN = 5
"""Added and removed examples that are named."""

COUNTS = (
    "before",
    "after",
    "kept",
    "added",
    "removed",
    "new_in_pool",
    "gone_from_pool",
    "common",
    "pool_before",
    "pool_after",
)


@dataclass
class RowsCompared:
    """Counts of distinct examples, by source [S] too, and rank correlations of the scores of the examples in both pools.

    `before`, `after`: selected. `new_in_pool`: of the added, those whose content the old pool did not hold;
    `gone_from_pool`: of the removed. `common`: examples of both pools.
    """

    sources: list[str]
    counts_S: dict[str, NDArray[np.int64]]
    spearman: float | None = None  # None: fewer than three common rows, or scores that are all equal
    spearman_rows: int = 0
    spearman_S: dict[int, float] = field(default_factory=dict)
    added: list[dict[str, Any]] = field(default_factory=list)  # the NUM_SHOWN that rank first among them
    removed: list[dict[str, Any]] = field(default_factory=list)

    def total(self, name: str) -> int:
        return int(self.counts_S[name].sum())


@dataclass(frozen=True)
class _Part:
    """Rows of one table whose ids lie in one part of all ids, in plan order."""

    high: NDArray[np.uint64]  # the id's first 64 bits, and its others
    low: NDArray[np.uint64]
    score: NDArray[np.float64]  # nan: unusable
    source: NDArray[np.int32]
    line: NDArray[np.int64]
    selected: NDArray[np.bool_]

    def shown(self, row: int, sources: list[str]) -> dict[str, Any]:
        return {
            "example_id": f"{self.high[row]:016x}{self.low[row]:016x}",
            "source": sources[self.source[row]],
            "line": int(self.line[row]),
            "score": float(self.score[row]),
        }


def compare_rows(old: Path, new: Path, highest_first: bool) -> RowsCompared:
    """Compare two scores.parquet.

    Args:
        highest_first: whether the added and removed examples that are named are those of the highest or the lowest scores.
    """
    names: dict[str, int] = {}
    num_rows = sum(pq.ParquetFile(path).metadata.num_rows for path in (old, new))
    num_parts = max(1, -(-num_rows // PART_ROWS))
    sign = -1.0 if highest_first else 1.0
    counts: dict[str, NDArray[np.int64]] = {name: np.zeros(0, np.int64) for name in COUNTS}
    compared = RowsCompared([], counts)
    for number in range(num_parts):
        before, after = (_read_part(path, number, num_parts, names) for path in (old, new))
        sources = list(names)
        of_old, of_new, old_C, new_C = _join(before, after)
        in_new_O, in_old_N = np.zeros(len(before.high), np.bool_), np.zeros(len(after.high), np.bool_)
        in_new_O[old_C], in_old_N[new_C] = True, True
        stays_O, stayed_N = np.zeros_like(in_new_O), np.zeros_like(in_old_N)
        stays_O[old_C], stayed_N[new_C] = after.selected[new_C], before.selected[old_C]
        removed_O = of_old[before.selected[of_old] & ~stays_O[of_old]]
        added_N = of_new[after.selected[of_new] & ~stayed_N[of_new]]
        found = {
            "before": before.source[of_old[before.selected[of_old]]],
            "after": after.source[of_new[after.selected[of_new]]],
            "kept": after.source[new_C[after.selected[new_C] & before.selected[old_C]]],
            "added": after.source[added_N],
            "removed": before.source[removed_O],
            "new_in_pool": after.source[added_N[~in_old_N[added_N]]],
            "gone_from_pool": before.source[removed_O[~in_new_O[removed_O]]],
            "common": after.source[new_C],
            "pool_before": before.source[of_old],
            "pool_after": after.source[of_new],
        }
        for name, source in found.items():
            counts[name] = _grown(counts[name], len(sources)) + np.bincount(source, minlength=len(sources))
        compared.added += _first(after, added_N, sources, sign)
        compared.removed += _first(before, removed_O, sources, sign)
        if number == 0:
            _correlate(compared, before.score[old_C], after.score[new_C], after.source[new_C])
    compared.sources = list(names)
    for ends in (compared.added, compared.removed):
        ends.sort(key=lambda row: (sign * row["score"], row["example_id"]))
        del ends[NUM_SHOWN:]
    return compared


def _read_part(path: Path, number: int, num_parts: int, names: dict[str, int]) -> _Part:
    """Rows whose ids lie in this part. Adds sources to `names`."""
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in _Part.__dataclass_fields__}
    seen, index_of = None, np.zeros(0, np.int32)
    for batch in pq.ParquetFile(path).iter_batches(columns=["example_id", "source", "line", "score", "selected"]):
        high_low = _parse_ids(batch["example_id"])
        # The part of an id: its first 32 bits as a share of all.
        inside = (high_low[:, 0] >> np.uint64(32)) * np.uint64(num_parts) >> np.uint64(32) == number
        dictionary = batch["source"].dictionary
        if seen is None or not dictionary.equals(seen):
            index_of = np.array([names.setdefault(name, len(names)) for name in dictionary.to_pylist()], np.int32)
            seen = dictionary
        found = {
            "high": high_low[:, 0],
            "low": high_low[:, 1],
            "score": batch["score"].to_numpy(zero_copy_only=False),
            "source": index_of[batch["source"].indices.to_numpy()],
            "line": batch["line"].to_numpy(),
            "selected": batch["selected"].to_numpy(zero_copy_only=False),
        }
        for name, values in found.items():
            columns[name].append(values[inside])
    types = {"high": "u8", "low": "u8", "score": "f8", "source": "i4", "line": "i8", "selected": "?"}
    return _Part(**{name: np.concatenate([np.zeros(0, types[name]), *parts]) for name, parts in columns.items()})


_NIBBLES = np.zeros(256, np.uint8)
_NIBBLES[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16, dtype=np.uint8)


def _parse_ids(ids: Any) -> NDArray[np.uint64]:
    """uint64 [N, 2] from strings of 32 hex digits."""
    digits = np.frombuffer(ids.buffers()[2], np.uint8)[32 * ids.offset : 32 * (ids.offset + len(ids))]
    nibbles = _NIBBLES[digits].reshape(-1, 2)
    return (nibbles[:, 0] << 4 | nibbles[:, 1]).view(">u8").astype(np.uint64).reshape(-1, 2)


def _join(old: _Part, new: _Part) -> tuple[NDArray[np.int64], ...]:
    """Rows of distinct ids of the old and of the new part; and, id by id of both, the old and the new row."""
    high, low = np.concatenate([old.high, new.high]), np.concatenate([old.low, new.low])
    is_new = np.arange(len(high)) >= len(old.high)
    unselected = ~np.concatenate([old.selected, new.selected])
    order = np.lexsort((unselected, is_new, low, high))
    repeats = np.zeros(len(order), np.bool_)
    repeats[1:] = _same(high, low, order) & (is_new[order[1:]] == is_new[order[:-1]])
    order = order[~repeats]
    both = np.flatnonzero(_same(high, low, order))
    of_new = is_new[order]
    return order[~of_new], order[of_new] - len(old.high), order[both], order[both + 1] - len(old.high)


def _same(high: NDArray[np.uint64], low: NDArray[np.uint64], order: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each row but the first has the id of the row before it."""
    here, before = order[1:], order[:-1]
    return (high[here] == high[before]) & (low[here] == low[before])


def _correlate(
    compared: RowsCompared, old_C: NDArray[np.float64], new_C: NDArray[np.float64], source_C: NDArray[np.int32]
) -> None:
    usable_C = ~np.isnan(old_C) & ~np.isnan(new_C)
    old_C, new_C, source_C = old_C[usable_C], new_C[usable_C], source_C[usable_C]
    compared.spearman_rows = len(old_C)
    compared.spearman = _spearman(old_C, new_C)
    order = np.argsort(source_C, kind="stable")
    sources, starts = np.unique(source_C[order], return_index=True)
    for source, rows in zip(sources.tolist(), np.split(order, starts[1:]), strict=True):
        if (value := _spearman(old_C[rows], new_C[rows])) is not None:
            compared.spearman_S[source] = value


def _spearman(old_C: NDArray[np.float64], new_C: NDArray[np.float64]) -> float | None:
    if len(old_C) < MIN_CORRELATED or np.ptp(old_C) == 0 or np.ptp(new_C) == 0:
        return None
    return spearman(old_C, new_C)


def _first(part: _Part, rows: NDArray[np.int64], sources: list[str], sign: float) -> list[dict[str, Any]]:
    """Those of `rows` that rank first."""
    order = np.lexsort((part.low[rows], part.high[rows], sign * part.score[rows]))[:NUM_SHOWN]
    return [part.shown(row, sources) for row in rows[order].tolist()]


def _grown(counts_S: NDArray[np.int64], num_sources: int) -> NDArray[np.int64]:
    return np.concatenate([counts_S, np.zeros(num_sources - len(counts_S), np.int64)])
