"""Publishes the result of reduction: tables, report, replaying spec, and last of all the manifest with their checksums.

Shapes: N candidates in plan order, Q target pairs.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from prism_job import __version__
from prism_job.plan.batch_record import batch_sizes
from prism_job.plan.plan import Plan
from prism_job.publish.compare.diff import Side, diff_to_previous
from prism_job.publish.manifest import Counts, FileName, Manifest, PreferenceModelFacts, TargetSetFacts, summary
from prism_job.publish.origins import Origins
from prism_job.publish.published import digest_of
from prism_job.publish.reduced import Reduced
from prism_job.publish.report.contents import gather
from prism_job.publish.report.page import render
from prism_job.publish.tables import write_tables
from prism_job.publish.warnings import warnings_of
from prism_job.score.column import parts
from prism_job.spec.document import SelectionRun
from prism_job.spec.extraction import AUTO
from prism_job.spec.model import ModelSpec
from prism_job.storage.objects import Store


def publish(reduced: Reduced, output: Store, folder: str) -> dict[str, Any]:
    """Write and put all files of the selection, the manifest last. Returns the outcome.

    The long tables go through a scratch folder (TMPDIR).
    """
    origins = Origins(reduced.plan)
    with tempfile.TemporaryDirectory(prefix="prism-") as scratch:
        manifest = _manifest(reduced, folder)  # before the tables: here is room for a copy of the scores
        tables = write_tables(reduced, origins, Path(scratch))
        here = Side(
            output.uri(f"{folder}/manifest.json"), manifest, tables["scores.parquet"], tables["targets.parquet"]
        )
        diff = diff_to_previous(output, folder, here)
        if diff:
            manifest = manifest.model_copy(update={"previous": diff["old"]["selection_id"]})
        files: dict[FileName, bytes | Path] = {
            **tables,
            "quarantine.jsonl": "".join(entry.model_dump_json() + "\n" for entry in reduced.quarantine).encode(),
            "plan.json": reduced.plan.settled().model_dump_json(indent=1).encode(),
            "spec.yaml": yaml.safe_dump(manifest.spec.to_document(), sort_keys=False, allow_unicode=True).encode(),
            "report.html": render(gather(reduced, origins, manifest, diff)).encode(),
        }
        for name, content in files.items():
            if isinstance(content, bytes):
                output.put(f"{folder}/{name}", content)
            else:
                output.put_file(f"{folder}/{name}", content)
        digests = {name: digest_of(content) for name, content in files.items()}
    document = manifest.model_copy(update={"files": digests}).model_dump(mode="json", exclude={"spec"})
    document["spec"] = manifest.spec.to_document()
    key = f"{folder}/manifest.json"
    output.put(key, json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False).encode())
    return manifest.outcome(output.uri(key))


def _manifest(reduced: Reduced, folder: str) -> Manifest:
    plan, scored, chosen = reduced.plan, reduced.scored, reduced.chosen
    usable_N = scored.usable_N
    counts = Counts(
        candidates=len(usable_N) + len(plan.quarantine),
        quarantined=len(reduced.quarantine),
        duplicates=int(chosen.duplicate_N.sum()),
        taken_by_budget=chosen.num_taken,
        selected=len(chosen.order),
        selected_tokens=sum(
            int(scored.tokens.part(part).sum(dtype=np.int64, where=chosen.selected_N[part]))
            for part in parts(len(usable_N))
        ),
        tokens=sum(int(scored.tokens.part(part).sum(dtype=np.int64)) for part in parts(len(usable_N))),
        target_pairs=len(reduced.targets.ids),
        units=len(plan.candidates),
        cut=scored.num_cut,
        cut_pairs=reduced.targets.num_cut,
    )
    return Manifest(
        run=reduced.run.metadata.name,
        selection_id=folder.rpartition("/")[2],
        spec=_replaying(reduced.run, plan),
        extractor=plan.extractor,
        extractor_parts=plan.extractor_parts,
        work=plan.work_digest(),
        layers={"captured": len(reduced.targets.layers), **reduced.targets.coverage} if reduced.targets.layers else {},
        counts=counts,
        layouts=plan.layouts,
        target_layouts=plan.target_layouts,
        threshold=chosen.threshold,
        scores=summary(reduced.scores.part(slice(0, len(usable_N)))[usable_N]),
        preference=summary(reduced.known_preference.copy()),
        preference_model=_preference_model(reduced),
        warnings=warnings_of(reduced),
        target_sets=_target_sets(reduced),
        curvature=reduced.curvature,
        evaluation=reduced.evaluation,
        audit=reduced.audit,
        rules=chosen.rules,
        used=reduced.used,
        code_version=__version__,
    )


def _preference_model(reduced: Reduced) -> PreferenceModelFacts | None:
    preference = reduced.plan.preference
    if preference is None:
        return None
    return PreferenceModelFacts(
        extractor=preference.extractor,
        extractor_parts=preference.extractor_parts,
        reference=summary(reduced.targets.reference_preference_Q.copy()),
    )


def _target_sets(reduced: Reduced) -> list[TargetSetFacts]:
    targets, facts = reduced.targets, []
    for number, target_set in enumerate(reduced.run.spec.targets.sets or ()):
        among_Q = targets.set_Q == number
        known_Q = among_Q & ~np.isnan(targets.preference_Q)
        facts.append(
            TargetSetFacts(
                name=target_set.name,
                pairs=int(among_Q.sum()),
                weight=target_set.weight,
                sign=target_set.sign,
                preference=summary(targets.preference_Q[known_Q]),
                norm=float(np.linalg.norm(targets.directions_KLPP[number])),
                share=None if np.isnan(targets.contribution_Q).any() else float(targets.contribution_Q[among_Q].sum()),
            )
        )
    return facts


def _replaying(run: SelectionRun, plan: Plan) -> SelectionRun:
    """The same run from any folder and at any time: local paths made absolute, model and data of the hub pinned to
    their commits.

    The tokens of a micro-batch are those that the run chose, if that was one number: they decide the last bits of its rows.
    """
    spec = run.spec
    sizes = batch_sizes(run, plan.extractor) if spec.extraction.tokens_per_batch == AUTO else set()
    sets = spec.targets.sets
    targets = (
        spec.targets.model_copy(update={"sets": tuple(_full_uris(each, plan.pinned) for each in sets)})
        if sets
        else _full_uris(spec.targets, plan.pinned)
    )
    changed = {
        "model": _replaying_model(spec.model, plan.extractor_parts),
        "candidates": _full_uris(spec.candidates, plan.pinned),
        "targets": targets,
        "extraction": spec.extraction.model_copy(update={"tokens_per_batch": sizes.pop()} if len(sizes) == 1 else {}),
        "store": _full(spec.store),
        "output": _full(spec.output),
    }
    if plan.preference and spec.scoring.preference_model:
        model = _replaying_model(spec.scoring.preference_model, plan.preference.extractor_parts)
        changed["scoring"] = spec.scoring.model_copy(update={"preference_model": model})
    return run.model_copy(update={"spec": spec.model_copy(update=changed)})


def _replaying_model(model: ModelSpec, parts: dict[str, Any]) -> ModelSpec:
    changed = {
        "uri": _full(model.uri),
        "adapter": model.adapter and _full(model.adapter),
        "revision": parts["model"].get("commit", model.revision),
    }
    return model.model_copy(update=changed)


def _full(uri: str) -> str:
    return str(Path(uri).resolve()) if "://" not in uri and Path(uri).exists() else uri


def _full_uris(section: Any, pinned: Mapping[str, str]) -> Any:
    return section.model_copy(update={"uris": tuple(pinned.get(uri) or _full(uri) for uri in section.uris)})
