"""The plan stage: read the data, cut it into units, stage their rows, list what the store lacks. Writes the plan last.

Reads each candidate file once. Later stages need neither the data files nor their formats.
"""

from typing import Any

from prism_job.data import hub
from prism_job.plan import checks, units
from prism_job.plan.extractor import (
    audit_spec,
    extractor_digest,
    extractor_parts,
    preference_parts,
    projection_and_codec,
)
from prism_job.plan.plan import Audit, Plan, Preference, Unit, digest_of, plan_key
from prism_job.plan.pool import read_pool, read_targets
from prism_job.plan.sample import Sample
from prism_job.plan.sources import list_sources, refuse_missing
from prism_job.progress import event
from prism_job.spec.document import RunSpec, SelectionRun
from prism_job.storage.address import open_store
from prism_job.storage.objects import Store
from prism_job.store import shards, staged_rows


def make_plan(run: SelectionRun) -> Plan:
    """Make and write the plan of a run.

    Raises:
        RequestError: nothing to read, empty pool, empty targets, a row without the label that `evaluation` names, a row that
            fits several layouts, `columns` that no row has.
        DataError: a bad target, or more bad candidates than `maxBadFraction`.
    """
    spec = run.spec
    checks.refuse_output_inside_data(spec)
    output, store = open_store(spec.output), open_store(spec.store)
    next(output.list(f"{run.metadata.name}/"), None)  # fails at once, not after hours, if the bucket does not exist
    refuse_missing(spec)
    parts, of_preference = extractor_parts(spec), preference_parts(spec)
    staged = staged_rows.staged_names(store)
    needs_rejected = spec.scoring.weighting == "preference"

    pinned = hub.pin([*spec.candidates.uris, *spec.targets.all_uris()])
    target_sources, target_sets, ignored = units.list_targets(spec, pinned)
    targets, target_layouts = read_targets(
        spec, target_sources, target_sets, store, staged, needs_rejected=needs_rejected
    )

    sources, others = list_sources(spec.candidates.uris, pinned)
    ignored |= others
    for uri, reason in ignored.items():
        event("ignored", uri=uri, reason=reason)
    as_text: dict[str, str] = {}
    pool = read_pool(spec, sources, store, staged, as_text)
    pool.check(spec, target_layouts, [])
    candidates = pool.units

    extractor = extractor_digest(parts)
    factors = units.factor_units(candidates) if spec.scoring.curvature.kind == "kfac" else []
    present = shards.units_present(store, extractor)
    plan = Plan(
        spec_digest=digest_of(spec),
        extractor=extractor,
        extractor_parts=parts,
        sources=[source.uri for source in sources],
        pinned=pinned,
        ignored=list(ignored),
        candidates=candidates,
        target_sources=[source.uri for source in target_sources],
        target_sets=target_sets,
        targets=targets,
        factors=factors,
        quarantine=pool.quarantine,
        layouts=pool.layouts,
        target_layouts=target_layouts,
        as_text=as_text,
        missing_candidates=_missing([unit.id for unit in candidates], present["candidates"]),
        missing_targets=_missing([unit.id for unit in targets], present["targets"]),
        missing_factors=_missing(factors, present["factors"]),
        audit=_plan_audit(spec, parts, store, staged, pool.sample, targets) if spec.audit.examples else None,
        preference=_plan_preference(of_preference, store, targets) if of_preference else None,
    )
    output.put(plan_key(run), plan.model_dump_json(indent=1).encode())
    if plan.num_missing:
        event("missing", **plan.missing_rows)
    return plan


def _plan_audit(
    spec: RunSpec, parts: dict[str, Any], store: Store, staged: set[str], sample: Sample, targets: list[Unit]
) -> Audit:
    extractor = extractor_digest({**parts, **projection_and_codec(audit_spec(spec))})
    sample_units = sample.stage(spec.extraction.examples_per_shard, store, staged)
    unit_ids = [unit.id for unit in sample_units]
    factors = unit_ids if spec.scoring.curvature.kind == "kfac" else []
    present = shards.units_present(store, extractor)
    return Audit(
        extractor=extractor,
        units=sample_units,
        positions=sample.positions,
        factors=factors,
        missing_candidates=_missing(unit_ids, present["candidates"]),
        missing_sums=_missing(
            [unit.id for unit in targets], present["targets" if spec.scoring.preference_model else "sums"]
        ),
        missing_factors=_missing(factors, present["factors"]),
    )


def _plan_preference(parts: dict[str, Any], store: Store, targets: list[Unit]) -> Preference:
    extractor = extractor_digest(parts)
    missing = _missing([unit.id for unit in targets], shards.units_present(store, extractor)["nll"])
    return Preference(extractor=extractor, extractor_parts=parts, missing=missing)


def _missing(unit_ids: list[str], present: set[str]) -> list[str]:
    return [unit_id for unit_id in dict.fromkeys(unit_ids) if unit_id not in present]
