"""The plan stage: read the data, name the units, stage their rows, list what the store lacks. Writes the plan last.

Reads each candidate file once. Later stages need neither the sources nor their formats.
"""

from __future__ import annotations

from typing import Any

from prism_job.data import data_files, examples
from prism_job.data.data_files import Row
from prism_job.plan import checks, units
from prism_job.plan.extractor import audit_spec, extractor_parts, projection_and_codec
from prism_job.plan.plan import Audit, Plan, Unit, plan_key
from prism_job.plan.sample import Sample
from prism_job.progress import event
from prism_job.spec.digest import digest
from prism_job.spec.document import RunSpec, SelectionRun
from prism_job.storage.address import open_store
from prism_job.storage.objects import Store
from prism_job.store import shards, staged_rows


def make_plan(run: SelectionRun) -> Plan:
    """Read the data, name the units, stage their rows, and list what is missing. Writes the plan last.

    Raises:
        RequestError: nothing to read, empty pool, empty targets, a row without the label that `evaluation` names.
        DataError: a bad target, or more bad candidates than `maxBadFraction`.
    """
    spec = run.spec
    checks.refuse_output_inside_data(spec)
    # Asked before anything is read: a bucket that is not there is better known now than after hours.
    next(open_store(spec.output).list(f"{run.metadata.name}/"), None)
    store = open_store(spec.store)
    parts = extractor_parts(spec)
    extractor = digest(parts)
    known = staged_rows.staged_names(store)

    labels = checks.Labels(spec.evaluation)
    target_sources, target_sets = units.list_targets(spec)
    needs_rejected = spec.scoring.weighting == "preference"
    targets, bad_targets = units.cut_units(
        target_sources,
        lambda row: examples.target_content(row, needs_rejected),
        units.PAIRS_PER_UNIT,
        store,
        known,
        lambda row, _, where: labels.check_target(row, where),
    )
    checks.check_targets(targets, bad_targets, target_sets, spec)

    sources, ignored = data_files.list_sources(spec.candidates.uris)
    for uri in ignored:
        event("ignored", uri=uri, reason="not a kind of data file that PRISM reads")
    sample = Sample(spec.audit.examples)

    def shown(row: Row, example_id: str, where: str) -> None:
        labels.check_candidate(row, where)
        sample.add(example_id, row)

    candidates, quarantine = units.cut_units(
        sources, examples.candidate_content, spec.extraction.examples_per_shard, store, known, shown
    )
    checks.check_bad_fraction(quarantine, sum(unit.num_rows for unit in candidates), spec)
    labels.check_both_kinds()

    factors = units.factor_units(candidates) if spec.scoring.curvature.kind == "kfac" else []
    present = shards.units_present(store, extractor)
    plan = Plan(
        request=digest(spec.model_dump(mode="json")),
        extractor=extractor,
        extractor_parts=parts,
        sources=[source.uri for source in sources],
        ignored=ignored,
        candidates=candidates,
        target_sources=[source.uri for source in target_sources],
        target_sets=target_sets,
        targets=targets,
        factors=factors,
        quarantine=quarantine,
        missing_candidates=_lacking([unit.id for unit in candidates], present["candidates"]),
        missing_targets=_lacking([unit.id for unit in targets], present["targets"]),
        missing_factors=_lacking(factors, present["factors"]),
        audit=_plan_audit(spec, parts, store, known, sample, targets) if spec.audit.examples else None,
    )
    open_store(spec.output).put(plan_key(run), plan.model_dump_json(indent=1).encode())
    return plan


def _plan_audit(
    spec: RunSpec, parts: dict[str, Any], store: Store, known: set[str], sample: Sample, targets: list[Unit]
) -> Audit:
    extractor = digest({**parts, **projection_and_codec(audit_spec(spec))})
    sample_units, places = sample.stage(spec.extraction.examples_per_shard, store, known)
    names = [unit.id for unit in sample_units]
    factors = names if spec.scoring.curvature.kind == "kfac" else []
    present = shards.units_present(store, extractor)
    return Audit(
        extractor=extractor,
        units=sample_units,
        places=places,
        factors=factors,
        missing_candidates=_lacking(names, present["candidates"]),
        missing_sums=_lacking([unit.id for unit in targets], present["sums"]),
        missing_factors=_lacking(factors, present["factors"]),
    )


def _lacking(wanted: list[str], present: set[str]) -> list[str]:
    return [unit_id for unit_id in dict.fromkeys(wanted) if unit_id not in present]
