"""The reduce stage: merge factors, weigh the targets, apply curvature, fold, score, select, publish.

Streams the shards; of a candidate it keeps its score and the few numbers beside it (about 60 bytes), never its row.

Shapes: N candidates in plan order, Q target pairs, L layers, P projected dims a side, D stored dims.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from prism_job import __version__, examples, projection
from prism_job.errors import DataError
from prism_job.plan import Plan, Quarantined, Unit, check_bad_fraction, read_plan, read_unit_rows
from prism_job.progress import Meter, event
from prism_job.reduce import curvature, manifest, preference, scoring
from prism_job.reduce.report import Report, ShownExample, render
from prism_job.reduce.selection import Selected, hex_ids, select
from prism_job.spec import SelectionRun
from prism_job.storage import shards
from prism_job.storage.objects import Store, open_store

Float64 = NDArray[np.float64]
NUM_SHOWN = 10
"""Examples shown at each end of the ranking in the report."""


@dataclass
class Targets:
    """What is known of the pairs: the plain direction g [L, P, P] and a few numbers for each."""

    ids: list[str]
    layers: list[str]
    direction_LPP: Float64
    preference_Q: Float64
    weight_Q: Float64
    contribution_Q: Float64
    chosen_nll_Q: Float64
    rejected_nll_Q: Float64


@dataclass
class Scored:
    """What is kept of the candidates."""

    scores_N: Float64
    ids_N: NDArray[np.void]
    tokens_N: NDArray[np.int32]
    nll_N: Float64
    norm_N: NDArray[np.float32]
    usable_N: NDArray[np.bool_]
    quarantined: list[Quarantined]


def reduce(run: SelectionRun) -> dict[str, Any]:
    """Publish the selection that spec and store give. Returns the last words.

    Raises:
        RequestError: no plan.
        DataError: a shard is missing or damaged, too many bad rows, or a damaged selection is in the way.
    """
    plan = read_plan(run)
    output, store = open_store(run.spec.output), open_store(run.spec.store)
    folder = manifest.folder_key(run, manifest.selection_id(run, plan))
    published = manifest.find_published(output, folder)
    if published is not None:
        event("unchanged", manifest=published)
        return {"manifest": published, "unchanged": True}

    targets = weigh_targets(run, plan, store)
    direction_D, curvature_facts = fold_direction(run, plan, store, targets)
    scored = score_candidates(run, plan, store, direction_D)
    check_bad_fraction([*plan.quarantine, *scored.quarantined], int(scored.usable_N.sum()), run.spec)
    chosen = select(scored.scores_N, scored.ids_N, scored.tokens_N, scored.usable_N, run.spec.selection)
    return _publish(run, plan, output, store, folder, targets, scored, chosen, curvature_facts)


def weigh_targets(run: SelectionRun, plan: Plan, store: Store) -> Targets:
    """Equations 1 to 3: π_q of every pair, and g = 1/|Q| Σ_q w_q (ḡ(q,y⁺) − ḡ(q,y⁻)).

    Two passes over the stored pairs: one to sum the direction, one for each pair's part in it.
    """
    ids: list[str] = []
    layers: list[str] = []
    dim = run.spec.extraction.projection.dim
    total: Float64 | None = None
    columns: dict[str, list[Float64]] = {"chosen_nll": [], "rejected_nll": [], "preference": [], "weight": []}
    for unit in plan.targets:
        shard = _read(store, plan, "targets", unit)
        layers = shard.notes["layers"]
        arrays = shard.arrays
        chosen, rejected = _mean_nll(arrays, "chosen"), _mean_nll(arrays, "rejected")
        # A pair without a rejected response (weighting: uniform) has no preference.
        preferred = np.where(np.isnan(rejected), np.nan, preference.preference(chosen, np.nan_to_num(rejected)))
        weight = preference.target_weights(run.spec.scoring.weighting, preferred)
        part = weight @ arrays["rows"].astype(np.float64)
        total = part if total is None else total + part
        ids += hex_ids(_void(arrays["ids"]))
        for name, values in zip(columns, (chosen, rejected, preferred, weight), strict=True):
            columns[name].append(values)
    assert total is not None
    joined = {name: np.concatenate(values) for name, values in columns.items()}
    dots = [_read(store, plan, "targets", unit).arrays["rows"].astype(np.float64) @ total for unit in plan.targets]
    return Targets(
        ids=ids,
        layers=layers,
        direction_LPP=(total / len(ids)).reshape(len(layers), dim, dim),
        preference_Q=joined["preference"],
        weight_Q=joined["weight"],
        contribution_Q=preference.contributions(joined["weight"] * np.concatenate(dots)),
        chosen_nll_Q=joined["chosen_nll"],
        rejected_nll_Q=joined["rejected_nll"],
    )


def fold_direction(run: SelectionRun, plan: Plan, store: Store, targets: Targets) -> tuple[Float64, dict[str, Any]]:
    """(H + λI)⁻¹ g in the unfolded space, then in the form the rows are stored in. Float64 [D], and facts to publish."""
    spec = run.spec
    direction = targets.direction_LPP
    facts: dict[str, Any] = {"kind": spec.scoring.curvature.kind}
    if spec.scoring.curvature.kind == "kfac":
        factors = merge_factors(run, plan, store)
        damping = spec.scoring.curvature.damping
        lam = curvature.damping_value(factors, damping)
        facts |= {"damping": damping, "lambda": lam, "tokens": factors.num_tokens, "units": len(plan.factors)}
        direction = curvature.solve(direction, factors, damping)
    if spec.extraction.codec.kind == "float16":
        return direction.reshape(-1), facts
    flat = direction.reshape(len(targets.layers), -1)
    seed, dims = spec.extraction.projection.seed, spec.extraction.codec.dims
    return projection.fold(flat, targets.layers, seed, dims), facts


def merge_factors(run: SelectionRun, plan: Plan, store: Store) -> curvature.Factors:
    """Sum the factor shards that the plan names, in its order."""
    dim = run.spec.extraction.projection.dim
    merged: curvature.Factors | None = None
    for unit_id in plan.factors:
        shard = shards.read_shard(store, plan.extractor, "factors", unit_id)
        inputs = curvature.unpack(shard.arrays["inputs"], dim)
        outputs = curvature.unpack(shard.arrays["outputs"], dim)
        part = curvature.Factors(inputs, outputs, int(shard.notes["num_tokens"]))
        if merged is None:
            merged = part
        else:
            merged.merge(part)
    assert merged is not None
    return merged


def score_candidates(run: SelectionRun, plan: Plan, store: Store, direction_D: Float64) -> Scored:
    """Equation 4 for every row of the plan, shard by shard."""
    score_rows = scoring.scorer(run.spec.extraction.codec.kind, direction_D)
    total = plan.num_examples
    scored = Scored(
        np.zeros(total),
        np.zeros(total, "V16"),
        np.zeros(total, np.int32),
        np.zeros(total),
        np.zeros(total, np.float32),
        np.zeros(total, np.bool_),
        [],
    )
    meter = Meter("reduce", total)
    start = 0
    for unit in plan.candidates:
        shard = _read(store, plan, "candidates", unit)
        arrays = shard.arrays
        part = slice(start, start + unit.num_rows)
        scored.scores_N[part] = scoring.finish(
            score_rows(arrays), arrays["tokens"], arrays["norm"], run.spec.scoring.score, run.spec.scoring.loss
        )
        scored.ids_N[part] = _void(arrays["ids"])
        scored.tokens_N[part] = arrays["tokens"]
        scored.nll_N[part] = arrays["nll"]
        scored.norm_N[part] = arrays["norm"]
        scored.usable_N[part] = arrays["tokens"] > 0
        lines = list(unit.line_numbers())
        scored.quarantined += [
            Quarantined(source=plan.sources[unit.source], line=lines[int(place)], reason=reason)
            for place, reason in shard.notes["quarantined"].items()
        ]
        start += unit.num_rows
        meter.add(unit.num_rows)
    return scored


def _read(store: Store, plan: Plan, kind: shards.Kind, unit: Unit) -> shards.Shard:
    shard = shards.read_shard(store, plan.extractor, kind, unit.id)
    ids = hex_ids(_void(shard.arrays["ids"]))
    if shards.unit_id_of(ids) != unit.id:
        where = store.uri(shards.shard_key(plan.extractor, kind, unit.id))
        raise DataError("foreign shard: its row ids are not the plan's", where=where, fix="delete it and run again")
    return shard


def _void(ids: NDArray[Any]) -> NDArray[np.void]:
    return np.ascontiguousarray(ids).view("V16").reshape(-1)


def _mean_nll(arrays: dict[str, NDArray[Any]], side: str) -> Float64:
    tokens = arrays[f"{side}_tokens"].astype(np.float64)
    return np.divide(arrays[f"{side}_nll"], tokens, out=np.full(len(tokens), np.nan), where=tokens > 0)


def _places(plan: Plan) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    sources = np.concatenate([np.full(unit.num_rows, unit.source, np.int32) for unit in plan.candidates])
    lines = np.concatenate([np.fromiter(unit.line_numbers(), np.int64, unit.num_rows) for unit in plan.candidates])
    return sources, lines


def _publish(
    run: SelectionRun,
    plan: Plan,
    output: Store,
    store: Store,
    folder: str,
    targets: Targets,
    scored: Scored,
    chosen: Selected,
    curvature_facts: dict[str, Any],
) -> dict[str, Any]:
    import pyarrow as pa

    sources_N, lines_N = _places(plan)
    names = pa.array(plan.sources)

    def source_column(positions: NDArray[np.int32]) -> Any:
        return pa.DictionaryArray.from_arrays(pa.array(positions), names)

    quarantine = [*plan.quarantine, *scored.quarantined]
    order = chosen.order
    files = {
        "selected.parquet": manifest.table_bytes(
            {
                "example_id": hex_ids(scored.ids_N[order]),
                "source": source_column(sources_N[order]),
                "line": lines_N[order],
                "score": scored.scores_N[order],
                "num_tokens": scored.tokens_N[order],
            }
        ),
        "scores.parquet": manifest.table_bytes(
            {
                "example_id": hex_ids(scored.ids_N),
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
        "plan.json": plan.model_dump_json(indent=1).encode(),
        "spec.yaml": yaml.safe_dump(run.to_document(), sort_keys=False, allow_unicode=True).encode(),
    }
    usable = scored.usable_N
    counts = {
        "candidates": len(usable) + len(plan.quarantine),
        "quarantined": len(quarantine),
        "duplicates": int(chosen.duplicate_N.sum()),
        "taken_by_budget": chosen.num_taken,
        "selected": len(order),
        "selected_tokens": int(scored.tokens_N[order].sum(dtype=np.int64)),
        "tokens": int(scored.tokens_N.sum(dtype=np.int64)),
        "target_pairs": len(targets.ids),
        "units": len(plan.candidates),
    }
    known = targets.preference_Q[~np.isnan(targets.preference_Q)]
    document = {
        "format": manifest.MANIFEST_FORMAT,
        "run": run.metadata.name,
        "selection_id": folder.rpartition("/")[2],
        "spec": run.to_document(),
        "extractor": plan.extractor,
        "extractor_parts": plan.extractor_parts,
        "work": plan.work_digest(),
        "counts": counts,
        "threshold": chosen.threshold,
        "scores": manifest.summary(scored.scores_N[usable]),
        "preference": manifest.summary(known),
        "curvature": curvature_facts,
        "code_version": __version__,
    }
    report = Report(
        run=run.metadata.name,
        selection_id=str(document["selection_id"]),
        model=run.spec.model.uri,
        settings={
            "weighting": run.spec.scoring.weighting,
            "score": run.spec.scoring.score,
            "loss": run.spec.scoring.loss,
            "curvature": json.dumps(curvature_facts),
            "selection": json.dumps(run.spec.selection.model_dump(mode="json", exclude_none=True)),
            "extractor": plan.extractor,
        },
        counts=counts,
        threshold=chosen.threshold,
        action=f"drop {run.spec.selection.drop}" if run.spec.selection.drop else f"keep {run.spec.selection.keep}",
        scores=scored.scores_N[usable],
        selected=chosen.selected_N[usable],
        preference=known,
        contribution=targets.contribution_Q,
        sources=plan.sources,
        source_of=sources_N[usable],
        highest=_shown(plan, store, scored, chosen, sources_N, lines_N, highest=True),
        lowest=_shown(plan, store, scored, chosen, sources_N, lines_N, highest=False),
        quarantine=[(entry.source, entry.line, entry.reason) for entry in quarantine],
        ignored=plan.ignored,
    )
    files["report.html"] = render(report).encode()
    address = manifest.publish(output, folder, files, document)
    return {"manifest": address, "selected": counts["selected"], "candidates": counts["candidates"]}


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
    starts = np.cumsum([0, *[unit.num_rows for unit in plan.candidates]])
    shown = []
    for place in ranked[:NUM_SHOWN].tolist():
        unit_place = int(np.searchsorted(starts, place, side="right")) - 1
        row = read_unit_rows(store, plan.candidates[unit_place])[place - int(starts[unit_place])]
        shown.append(
            ShownExample(
                score=float(scored.scores_N[place]),
                source=plan.sources[int(sources_N[place])],
                line=int(lines_N[place]),
                selected=bool(chosen.selected_N[place]),
                text=examples.shown_text(examples.candidate_content(row)),
            )
        )
    return shown
