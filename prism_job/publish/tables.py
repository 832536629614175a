"""selected.parquet, scores.parquet and targets.parquet. The long ones are written a row group at a time.

Shapes: N candidates in plan order.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prism_job.errors import TransientError
from prism_job.publish.manifest import FileName
from prism_job.publish.origins import Origins
from prism_job.publish.reduced import Reduced
from prism_job.score.column import SCRATCH_FIX, parts
from prism_job.store import shards


def write_tables(reduced: Reduced, origins: Origins, folder: Path) -> dict[FileName, Path]:
    """Write the tables into the folder. Returns their paths. Raises TransientError: the folder has no room."""
    targets = reduced.targets
    in_sets = {"set": np.array(reduced.set_names)[targets.set_Q]} if reduced.run.spec.targets.sets else {}
    target_columns = {
        "example_id": targets.ids,
        **in_sets,
        "preference": pa.array(targets.preference_Q, from_pandas=True),
        **({"reference_preference": targets.reference_preference_Q} if reduced.plan.preference else {}),
        "weight": targets.weight_Q,
        "contribution": pa.array(targets.contribution_Q, from_pandas=True),
        "chosen_mean_nll": targets.chosen_nll_Q,
        "rejected_mean_nll": pa.array(targets.rejected_nll_Q, from_pandas=True),
    }
    columns: dict[FileName, Iterable[dict[str, Any]]] = {
        "selected.parquet": _selected_parts(origins, reduced),
        "scores.parquet": _score_parts(origins, reduced),
        "targets.parquet": [target_columns],
    }
    return {name: _write_table(folder / name, parts_of_table) for name, parts_of_table in columns.items()}


def _selected_parts(origins: Origins, reduced: Reduced) -> Iterator[dict[str, Any]]:
    scored, order = reduced.scored, reduced.chosen.order
    for part in parts(len(order)):
        rows = order[part]
        yield {
            "example_id": _id_column(scored.ids.at(rows)),
            **origins.columns(rows),
            "score": reduced.scores.at(rows),
            "num_tokens": scored.tokens.at(rows),
        }


def _score_parts(origins: Origins, reduced: Reduced) -> Iterator[dict[str, Any]]:
    scored, chosen = reduced.scored, reduced.chosen
    by_set = {f"score_{name}": column for name, column in zip(reduced.set_names, scored.scores, strict=True) if name}
    for part in parts(len(reduced.scores)):
        unusable = ~scored.usable_N[part]
        yield {
            "example_id": _id_column(scored.ids.part(part)),
            **origins.columns(np.arange(part.start, part.stop)),
            "score": pa.array(reduced.scores.part(part), mask=unusable),
            **{name: pa.array(column.part(part), mask=unusable) for name, column in by_set.items()},
            "nll": pa.array(scored.nll.part(part), mask=unusable),
            "norm": pa.array(scored.norm.part(part), mask=unusable),
            "num_tokens": scored.tokens.part(part),
            "selected": chosen.selected_N[part],
            "duplicate": chosen.duplicate_N[part],
            **({"duplicate_of": _duplicate_of(reduced, part)} if chosen.near else {}),
        }


def _duplicate_of(reduced: Reduced, part: slice) -> Any:
    """The example id of the row that each duplicate repeats or nearly repeats, null for other rows."""
    assert reduced.chosen.near
    repeats, repeated = reduced.chosen.near  # in plan order
    within = slice(*np.searchsorted(repeats, [part.start, part.stop]))
    of = np.arange(part.start, part.stop)  # an exact duplicate has the id of the row that it repeats
    of[repeats[within] - part.start] = repeated[within]
    ids = shards.hex_array(reduced.scored.ids.at(of))
    return pa.array(ids, mask=~reduced.chosen.duplicate_N[part]).cast(pa.string())


def _id_column(ids_N: NDArray[Any]) -> Any:
    return pa.array(shards.hex_array(ids_N)).cast(pa.string())


def _write_table(path: Path, parts_of_table: Iterable[Mapping[str, Any]]) -> Path:
    """A parquet file of these columns, a row group a part; the same parts give the same bytes. Returns the path."""
    waiting = (pa.table(dict(columns)) for columns in parts_of_table)
    first = next(waiting)
    try:
        with pq.ParquetWriter(path, first.schema, compression="zstd") as writer:
            for table in chain([first], waiting):
                writer.write_table(table)
    except OSError as error:
        raise TransientError(f"cannot be written: {error}", where=str(path), fix=SCRATCH_FIX) from error
    return path
