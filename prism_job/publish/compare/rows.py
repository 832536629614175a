"""The rows of two scores.parquet joined by example id, part by part of the ids. Does not know manifests or what was asked for.

Memory does not grow with the rows: example ids are digests, so their first bits cut both tables into parts of one size,
which lie in scratch files (TMPDIR). An id counts once in a table, selected if one of its rows is.

Shapes: O, N rows of a part in the old and in the new table; C examples of both; S sources of either; W parts.
"""

from binascii import unhexlify
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prism_job.evaluate.audit import spearman
from prism_job.score.column import Column

Rows = NDArray[np.void]
"""Of type ROW."""

PART_ROWS = 2**18
"""Rows of both tables together in memory at a time: about 40 MB."""

MAX_PARTS = 200
"""Each part is two open files; a process may have 1,024. Beyond 50 million rows parts grow."""

MAX_CORRELATED = 2**18
"""Common rows from which no more parts are added to the rank correlation. What it then rests on is a sample of the ids, whose
standard error is .002."""

COLUMNS = ["example_id", "source", "line", "score", "selected"]
BATCH_ROWS = 2**14
"""As many as a row group of a published table has."""

ROW = np.dtype([("high", "u8"), ("low", "u8"), ("score", "f8"), ("line", "i8"), ("source", "i4"), ("selected", "?")])
"""A row in a scratch file. The first 64 bits of its id, and its others; score nan: unusable; source: index of its name."""

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


def compare_rows(old: Path, new: Path, highest_first: bool) -> RowsCompared:
    """Compare two scores.parquet.

    Args:
        highest_first: whether the added and removed examples that are named are those of the highest or the lowest scores.
    """
    names: dict[str, int] = {}
    num_rows = sum(pq.ParquetFile(path).metadata.num_rows for path in (old, new))
    num_parts = min(MAX_PARTS, max(1, -(-num_rows // PART_ROWS)))
    before_W, after_W = (_cut(path, num_parts, names) for path in (old, new))
    sources = list(names)
    sign = -1.0 if highest_first else 1.0
    counts = {name: np.zeros(len(sources), np.int64) for name in COUNTS}
    compared = RowsCompared(sources, counts)
    common: list[tuple[Any, ...]] = []
    for before_column, after_column in zip(before_W, after_W, strict=True):
        before, after = (column.part(slice(0, len(column))) for column in (before_column, after_column))
        of_old, of_new, old_C, new_C = _join(before, after)
        in_new_O, in_old_N = np.zeros(len(before), np.bool_), np.zeros(len(after), np.bool_)
        in_new_O[old_C], in_old_N[new_C] = True, True
        stays_O, stayed_N = np.zeros_like(in_new_O), np.zeros_like(in_old_N)
        stays_O[old_C], stayed_N[new_C] = after["selected"][new_C], before["selected"][old_C]
        removed = of_old[before["selected"][of_old] & ~stays_O[of_old]]
        added = of_new[after["selected"][of_new] & ~stayed_N[of_new]]
        found = {
            "before": before[of_old[before["selected"][of_old]]],
            "after": after[of_new[after["selected"][of_new]]],
            "kept": after[new_C[after["selected"][new_C] & before["selected"][old_C]]],
            "added": after[added],
            "removed": before[removed],
            "new_in_pool": after[added[~in_old_N[added]]],
            "gone_from_pool": before[removed[~in_new_O[removed]]],
            "common": after[new_C],
            "pool_before": before[of_old],
            "pool_after": after[of_new],
        }
        for name, rows in found.items():
            counts[name] += np.bincount(rows["source"], minlength=len(sources))
        compared.added = _first([*compared.added, *_shown(found["added"], sources, sign)], sign)
        compared.removed = _first([*compared.removed, *_shown(found["removed"], sources, sign)], sign)
        if sum(len(scores) for scores, *_ in common) < MAX_CORRELATED:
            common.append((before["score"][old_C], after["score"][new_C], after["source"][new_C]))
    _correlate(compared, *map(np.concatenate, zip(*common, strict=True)))
    return compared


def _cut(path: Path, num_parts: int, names: dict[str, int]) -> list[Column]:
    """The rows of a table, in plan order, in a scratch file for each part of the ids. Adds its sources to `names`."""
    columns_W = [Column(ROW) for _ in range(num_parts)]
    seen, index_of = None, np.zeros(0, np.int32)
    # With pre_buffer, its default, pyarrow keeps what it has read: 300 MB at 10 million rows.
    table = pq.ParquetFile(path, pre_buffer=False, buffer_size=2**16)
    for batch in table.iter_batches(BATCH_ROWS, columns=COLUMNS, use_threads=False):
        dictionary = batch["source"].dictionary
        if seen is None or not dictionary.equals(seen):
            index_of = np.array([names.setdefault(name, len(names)) for name in dictionary.to_pylist()], np.int32)
            seen = dictionary
        rows = np.empty(len(batch), ROW)
        rows["high"], rows["low"] = _parse_ids(batch["example_id"]).T
        rows["source"] = index_of[batch["source"].indices.to_numpy()]
        for name in ("line", "score", "selected"):
            rows[name] = batch[name].to_numpy(zero_copy_only=False)
        # The part of an id: its first 32 bits as a share of all.
        part = (rows["high"] >> np.uint64(32)) * np.uint64(num_parts) >> np.uint64(32)
        order = np.argsort(part, kind="stable")
        ends = np.cumsum(np.bincount(part.astype(np.int64), minlength=num_parts))
        for column, inside in zip(columns_W, np.split(order, ends[:-1]), strict=True):
            column.append(rows[inside])
    return columns_W


def _parse_ids(ids: Any) -> NDArray[np.uint64]:
    """uint64 [N, 2] from strings of 32 hex digits."""
    digits = memoryview(ids.buffers()[2])[32 * ids.offset : 32 * (ids.offset + len(ids))]
    return np.frombuffer(unhexlify(digits), ">u8").astype(np.uint64).reshape(-1, 2)


def _join(old: Rows, new: Rows) -> tuple[NDArray[np.int64], ...]:
    """Rows of distinct ids of the old and of the new part; and, id by id of both, the old and the new row."""
    high, low = (np.concatenate([old[half], new[half]]) for half in ("high", "low"))
    is_new = np.arange(len(high)) >= len(old)
    unselected = ~np.concatenate([old["selected"], new["selected"]])
    order = np.lexsort((unselected, is_new, low, high))
    repeats = np.zeros(len(order), np.bool_)
    repeats[1:] = _same(high, low, order) & (is_new[order[1:]] == is_new[order[:-1]])
    order = order[~repeats]
    both = np.flatnonzero(_same(high, low, order))
    of_new = is_new[order]
    return order[~of_new], order[of_new] - len(old), order[both], order[both + 1] - len(old)


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


def _shown(rows: Rows, sources: list[str], sign: float) -> list[dict[str, Any]]:
    """Those that rank first, as a person reads them."""
    first = rows[np.lexsort((rows["low"], rows["high"], sign * rows["score"]))[:NUM_SHOWN]]
    return [
        {"example_id": f"{high:016x}{low:016x}", "source": sources[source], "line": line, "score": score}
        for high, low, score, line, source, _ in first.tolist()
    ]


def _first(shown: list[dict[str, Any]], sign: float) -> list[dict[str, Any]]:
    return sorted(shown, key=lambda row: (sign * row["score"], row["example_id"]))[:NUM_SHOWN]
