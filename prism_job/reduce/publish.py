"""The files of a selection, made from what reduction found: tables, report, spec, and the manifest that vouches for them.

Shapes: N candidates in plan order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from numpy.typing import NDArray

from prism_job import __version__, examples
from prism_job.plan import Plan, Unit
from prism_job.reduce import manifest
from prism_job.reduce.preference import Targets
from prism_job.reduce.report import Report, ShownExample, ShownPair, render
from prism_job.reduce.scoring import Scored
from prism_job.reduce.selection import Selected
from prism_job.spec import SelectionRun
from prism_job.storage import shards, staged
from prism_job.storage.objects import Store
from prism_job.storage.rows import Row

NUM_SHOWN = 10
"""Examples shown at each end of the ranking in the report."""
NUM_PAIRS = 3
"""Target pairs shown in the report, those of the largest share in the direction."""


def _settled(plan: Plan) -> Plan:
    # What the store lacked when planned is no part of the outcome: the same selection has the same plan.json.
    return plan.model_copy(update={"missing_candidates": [], "missing_targets": [], "missing_factors": []})


def _replaying(run: SelectionRun, plan: Plan) -> SelectionRun:
    """The same run from any folder and at any time: local paths made absolute, a hub model pinned to its commit."""

    def full(uri: str) -> str:
        return str(Path(uri).resolve()) if "://" not in uri and Path(uri).exists() else uri

    spec = run.spec
    model = {
        "uri": full(spec.model.uri),
        "adapter": spec.model.adapter and full(spec.model.adapter),
        "revision": plan.extractor_parts["model"].get("commit", spec.model.revision),
    }
    changed = {
        "model": spec.model.model_copy(update=model),
        "candidates": spec.candidates.model_copy(update={"uris": tuple(map(full, spec.candidates.uris))}),
        "targets": spec.targets.model_copy(update={"uris": tuple(map(full, spec.targets.uris))}),
        "store": full(spec.store),
        "output": full(spec.output),
    }
    return run.model_copy(update={"spec": spec.model_copy(update=changed)})


def _places(plan: Plan) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    sources = np.concatenate([np.full(unit.num_rows, unit.source, np.int32) for unit in plan.candidates])
    lines = np.concatenate([np.fromiter(unit.line_numbers(), np.int64, unit.num_rows) for unit in plan.candidates])
    return sources, lines


def _id_column(ids_N: NDArray[np.void]) -> Any:
    return pa.array(shards.hex_array(ids_N)).cast(pa.string())


def publish(
    run: SelectionRun,
    plan: Plan,
    store: Store,
    output: Store,
    folder: str,
    targets: Targets,
    scored: Scored,
    chosen: Selected,
    curvature_facts: dict[str, Any],
) -> dict[str, Any]:
    sources_N, lines_N = _places(plan)
    names = pa.array(plan.sources)

    def source_column(positions: NDArray[np.int32]) -> Any:
        return pa.DictionaryArray.from_arrays(pa.array(positions), names)

    quarantine = [*plan.quarantine, *scored.quarantined]
    order = chosen.order
    replaying = _replaying(run, plan)
    files: dict[manifest.FileName, bytes] = {
        "selected.parquet": manifest.table_bytes(
            {
                "example_id": _id_column(scored.ids_N[order]),
                "source": source_column(sources_N[order]),
                "line": lines_N[order],
                "score": scored.scores_N[order],
                "num_tokens": scored.tokens_N[order],
            }
        ),
        "scores.parquet": manifest.table_bytes(
            {
                "example_id": _id_column(scored.ids_N),
                "source": source_column(sources_N),
                "line": lines_N,
                "score": pa.array(scored.scores_N, mask=~scored.usable_N),
                "nll": pa.array(scored.nll_N, mask=~scored.usable_N),
                "norm": pa.array(scored.norm_N, mask=~scored.usable_N),
                "num_tokens": scored.tokens_N,
                "selected": chosen.selected_N,
                "duplicate": chosen.duplicate_N,
            }
        ),
        "targets.parquet": manifest.table_bytes(
            {
                "example_id": targets.ids,
                "preference": pa.array(targets.preference_Q, from_pandas=True),
                "weight": targets.weight_Q,
                "contribution": targets.contribution_Q,
                "chosen_mean_nll": targets.chosen_nll_Q,
                "rejected_mean_nll": pa.array(targets.rejected_nll_Q, from_pandas=True),
            }
        ),
        "quarantine.jsonl": "".join(entry.model_dump_json() + "\n" for entry in quarantine).encode(),
        "plan.json": _settled(plan).model_dump_json(indent=1).encode(),
        "spec.yaml": yaml.safe_dump(replaying.to_document(), sort_keys=False, allow_unicode=True).encode(),
    }
    usable = scored.usable_N
    counts = manifest.Counts(
        candidates=len(usable) + len(plan.quarantine),
        quarantined=len(quarantine),
        duplicates=int(chosen.duplicate_N.sum()),
        taken_by_budget=chosen.num_taken,
        selected=len(order),
        selected_tokens=int(scored.tokens_N[order].sum(dtype=np.int64)),
        tokens=int(scored.tokens_N.sum(dtype=np.int64)),
        target_pairs=len(targets.ids),
        units=len(plan.candidates),
    )
    known = targets.preference_Q[~np.isnan(targets.preference_Q)]
    document = manifest.Manifest(
        run=run.metadata.name,
        selection_id=folder.rpartition("/")[2],
        spec=replaying,
        extractor=plan.extractor,
        extractor_parts=plan.extractor_parts,
        work=plan.work_digest(),
        counts=counts,
        threshold=chosen.threshold,
        scores=manifest.summary(scored.scores_N[usable]),
        preference=manifest.summary(known),
        curvature=curvature_facts,
        code_version=__version__,
    )
    report = Report(
        run=run.metadata.name,
        selection_id=document.selection_id,
        model=run.spec.model.uri,
        settings={
            "weighting": run.spec.scoring.weighting,
            "score": run.spec.scoring.score,
            "loss": run.spec.scoring.loss,
            "curvature": json.dumps(curvature_facts),
            "selection": json.dumps(run.spec.selection.model_dump(mode="json", exclude_none=True)),
            "extractor": plan.extractor,
        },
        counts=counts.model_dump(),
        threshold=chosen.threshold,
        action=f"drop {run.spec.selection.drop}" if run.spec.selection.drop else f"keep {run.spec.selection.keep}",
        scores=scored.scores_N[usable],
        selected=chosen.selected_N[usable],
        preference=known,
        contribution=targets.contribution_Q,
        pairs=_shown_pairs(plan, store, targets),
        sources=plan.sources,
        source_of=sources_N[usable],
        highest=_shown(plan, store, scored, chosen, sources_N, lines_N, highest=True),
        lowest=_shown(plan, store, scored, chosen, sources_N, lines_N, highest=False),
        quarantine=[(entry.source, entry.line, entry.reason) for entry in quarantine],
        ignored=plan.ignored,
    )
    files["report.html"] = render(report).encode()
    return manifest.publish(output, folder, files, document)


def _shown(
    plan: Plan,
    store: Store,
    scored: Scored,
    chosen: Selected,
    sources_N: NDArray[np.int32],
    lines_N: NDArray[np.int64],
    *,
    highest: bool,
) -> list[ShownExample]:
    ranked = np.flatnonzero(scored.usable_N & ~chosen.duplicate_N)
    ranked = ranked[np.argsort(-scored.scores_N[ranked] if highest else scored.scores_N[ranked], kind="stable")]
    return [
        ShownExample(
            score=float(scored.scores_N[place]),
            source=plan.sources[int(sources_N[place])],
            line=int(lines_N[place]),
            selected=bool(chosen.selected_N[place]),
            text=examples.shown_text(examples.candidate_content(_row_at(plan.candidates, place, store))),
        )
        for place in ranked[:NUM_SHOWN].tolist()
    ]


def _shown_pairs(plan: Plan, store: Store, targets: Targets) -> list[ShownPair]:
    largest = np.argsort(-targets.contribution_Q, kind="stable")[:NUM_PAIRS]
    return [
        ShownPair(
            number=place + 1,
            share=float(targets.contribution_Q[place]),
            text=examples.shown_text(
                examples.target_content(_row_at(plan.targets, place, store), needs_rejected=False), labelled=True
            ),
        )
        for place in largest.tolist()
    ]


def _row_at(units: list[Unit], place: int, store: Store) -> Row:
    """The row at a place in the order of all units' rows."""
    for unit in units:
        if place < unit.num_rows:
            return staged.read_rows(store, unit.rows)[place]
        place -= unit.num_rows
    raise IndexError(place)
