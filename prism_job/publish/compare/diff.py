"""The verb `diff`: two published selections compared; and a selection, before it is published, with the one before it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from prism_job.errors import DataError, RequestError
from prism_job.publish.compare.inputs import Pairs, PoolCounts, find_changes
from prism_job.publish.compare.rows import RowsCompared, compare_rows
from prism_job.publish.manifest import Manifest
from prism_job.publish.published import Published, load
from prism_job.storage.objects import Store


@dataclass(frozen=True)
class Side:
    """One of the two selections, its tables as files on this disk."""

    uri: str
    manifest: Manifest
    scores: Path
    targets: Path


def diff(old_uri: str, new_uri: str) -> dict[str, Any]:
    """The facts of `compare_sides` for two manifests.

    Raises:
        RequestError: no manifest there.
        DataError: one of the selections is damaged, or of another version.
    """
    with opened(load(old_uri)) as old, opened(load(new_uri)) as new:
        return compare_sides(old, new)


def diff_to_previous(output: Store, folder: str, new: Side) -> dict[str, Any] | None:
    """The facts of `compare_sides` for the newest earlier selection of the same run; None for the first.

    Newest by the time of its manifest in the output: no clock of a machine that runs the job counts. A selection that cannot
    be read does not end a run that has scored everything: only `old` and `reason` are there then.
    """
    run = folder.partition("/")[0]
    manifests = [
        listed
        for listed in output.list(f"{run}/")
        if listed.key.endswith("/manifest.json")
        and listed.key.count("/") == 2
        and listed.key != f"{folder}/manifest.json"
    ]
    if not manifests:
        return None
    key = max(manifests, key=lambda listed: (listed.modified, listed.key)).key
    uri = output.uri(key)
    try:
        with opened(load(uri)) as old:
            return compare_sides(old, new)
    except (DataError, RequestError) as error:
        return {"old": {"manifest": uri, "selection_id": key.split("/")[1]}, "reason": f"{error.what} ({error.where})"}


@contextmanager
def opened(published: Published) -> Iterator[Side]:
    """Its tables checked and on this disk, while the context lasts."""
    with ExitStack() as stack:
        scores, targets = (
            stack.enter_context(published.as_file(name)) for name in ("scores.parquet", "targets.parquet")
        )
        yield Side(published.uri, published.manifest, scores, targets)


def compare_sides(old: Side, new: Side) -> dict[str, Any]:
    """Counts of distinct examples (`RowsCompared`), and which inputs changed.

    `overlap`: Jaccard, kept / (kept + added + removed). `kept_share`: of the old selection. `churn`: (added + removed) /
    (selected before + selected after), 0 for the same examples and 1 for none in common; between two selections of one size
    it is the share that was replaced.
    """
    selection = new.manifest.spec.spec.selection
    highest_first = selection.keep == "highest" or selection.drop == "lowest"
    rows = compare_rows(old.scores, new.scores, highest_first)
    totals = {name: rows.total(name) for name in rows.counts_S}
    common = totals["common"]
    pool = PoolCounts(totals["pool_after"] - common, totals["pool_before"] - common, common)
    changes = find_changes(old.manifest, new.manifest, pool, _pairs(old.targets), _pairs(new.targets))
    return {
        "old": _named(old),
        "new": _named(new),
        **_figures(totals, rows.spearman),
        "spearman_rows": rows.spearman_rows,
        "by_source": _by_source(rows),
        "added_first": rows.added,
        "removed_first": rows.removed,
        "changes": [change._asdict() for change in changes],
    }


def _named(side: Side) -> dict[str, Any]:
    return {"manifest": side.uri, "run": side.manifest.run, "selection_id": side.manifest.selection_id}


def _figures(counts: dict[str, int], rank_correlation: float | None) -> dict[str, Any]:
    kept, moved = counts["kept"], counts["added"] + counts["removed"]
    return {
        **counts,
        "overlap": kept / (kept + moved) if kept + moved else 1.0,
        "kept_share": kept / (kept + counts["removed"]) if kept + counts["removed"] else 1.0,
        "churn": moved / (2 * kept + moved) if moved else 0.0,
        "spearman": rank_correlation,
    }


def _by_source(rows: RowsCompared) -> list[dict[str, Any]]:
    """The figures of each source, those with the most changed examples first. An example that moved to another file counts as
    kept, in its new source."""
    of_each = []
    for number, source in enumerate(rows.sources):
        counts = {name: int(counts_S[number]) for name, counts_S in rows.counts_S.items()}
        of_each.append({"source": source, **_figures(counts, rows.spearman_S.get(number))})
    return sorted(of_each, key=lambda it: (-it["added"] - it["removed"], it["source"]))


def _pairs(targets: Path) -> Pairs:
    table = pq.read_table(targets)
    names = table["set"].to_pylist() if "set" in table.column_names else [""] * len(table)
    pairs: dict[str, set[str]] = {}
    for name, example_id in zip(names, table["example_id"].to_pylist(), strict=True):
        pairs.setdefault(name, set()).add(example_id)
    return {name: frozenset(ids) for name, ids in pairs.items()}
