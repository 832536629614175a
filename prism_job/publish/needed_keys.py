"""Which keys of a store kept selections need: those of the plan beside each manifest, its audit's and its
preference model's included.

A plan whose selection is not published yet counts as well: its run may be in progress.
"""

from collections.abc import Sequence

from pydantic import ValidationError

from prism_job.errors import DataError, RequestError
from prism_job.plan.plan import Plan
from prism_job.publish.published import load
from prism_job.storage.address import open_store
from prism_job.storage.objects import Store
from prism_job.store import shards, staged_rows
from prism_job.store.inventory import Needed


def find_needed(keep: Sequence[str]) -> Needed:
    """What the manifests below these outputs need, and the plans of runs that have not published yet.

    Raises:
        RequestError: no manifest below one of them: perhaps a mistyped address, and all that it should keep would be removed.
        DataError: a damaged manifest or plan.
    """
    needed = Needed()
    for uri in keep:
        output = open_store(uri)
        keys = dict.fromkeys(listed.key for listed in output.list())
        published: set[str] = set()
        for key in keys:
            if key.rpartition("/")[2] == "manifest.json":
                selection = load(output.uri(key))
                _add(needed, selection.plan())
                needed.selections.append(output.uri(key))
                published.add(selection.manifest.work)
        if not published:
            fix = "check the address: give spec.output of the runs to keep, or a folder below it"
            raise RequestError("no manifest is found there, so nothing of it would be kept", where=uri, fix=fix)
        for key in keys:
            folder, _, name = key.rpartition("/")
            if name != "plan.json" or f"{folder}/manifest.json".lstrip("/") in keys:
                continue
            plan = _read_plan(output, key)
            if plan.work_digest() not in published:
                _add(needed, plan)
                needed.unfinished.append(output.uri(key))
    return needed


def _add(needed: Needed, plan: Plan) -> None:
    targets = [unit.id for unit in plan.targets]
    candidates = [unit.id for unit in plan.candidates]
    sample = plan.audit.units if plan.audit else []
    _add_shards(needed, plan.extractor, {"candidates": candidates, "targets": targets, "factors": plan.factors})
    if plan.audit:
        sampled = [unit.id for unit in sample]
        units: dict[shards.Kind, list[str]] = {
            "candidates": sampled,
            plan.audit_kind: targets,
            "factors": plan.audit.factors,
        }
        _add_shards(needed, plan.audit.extractor, units)
    if plan.preference:
        _add_shards(needed, plan.preference.extractor, {"nll": targets})
    needed.keys |= {staged_rows.rows_key(unit.rows) for unit in [*plan.candidates, *plan.targets, *sample]}


def _add_shards(needed: Needed, extractor: str, units: dict[shards.Kind, list[str]]) -> None:
    needed.extractors[extractor] += 1
    for kind, unit_ids in units.items():
        needed.keys |= {shards.shard_key(extractor, kind, unit_id) for unit_id in unit_ids}


def _read_plan(output: Store, key: str) -> Plan:
    try:
        return Plan.model_validate_json(output.get(key))
    except ValidationError as error:
        fix = "delete that plan if its run is not wanted any more, or run its plan stage again"
        raise DataError(
            "damaged plan: cannot tell which objects its run needs", where=output.uri(key), fix=fix
        ) from error
