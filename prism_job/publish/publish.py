"""The files of a selection, made from what reduction found: tables, report, spec, and the manifest that vouches for them.

Shapes: N candidates in plan order.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from numpy.typing import NDArray

from prism_job import __version__
from prism_job.data import examples
from prism_job.data.data_files import Row
from prism_job.plan.plan import Plan, Quarantined, Unit
from prism_job.publish import manifest
from prism_job.publish.report import Report, ShownExample, ShownPair, ShownSet, render
from prism_job.score.column import Column, parts
from prism_job.score.preference import Targets
from prism_job.score.scoring import Scored
from prism_job.score.selection import Selected
from prism_job.spec.document import SelectionRun
from prism_job.storage.objects import Store
from prism_job.store import shards, staged_rows

NUM_PAIRS = 3
"""Target pairs shown in the report, those of the largest share in the direction."""


def _replaying(run: SelectionRun, plan: Plan) -> SelectionRun:
    """The same run from any folder and at any time: local paths made absolute, a hub model pinned to its commit."""

    def full(uri: str) -> str:
        return str(Path(uri).resolve()) if "://" not in uri and Path(uri).exists() else uri

    def full_uris(given: Any) -> Any:
        return given.model_copy(update={"uris": tuple(map(full, given.uris))})

    spec = run.spec
    sets = spec.targets.sets
    model = {
        "uri": full(spec.model.uri),
        "adapter": spec.model.adapter and full(spec.model.adapter),
        "revision": plan.extractor_parts["model"].get("commit", spec.model.revision),
    }
    changed = {
        "model": spec.model.model_copy(update=model),
        "candidates": full_uris(spec.candidates),
        "targets": spec.targets.model_copy(update={"sets": tuple(map(full_uris, sets))})
        if sets
        else full_uris(spec.targets),
        "store": full(spec.store),
        "output": full(spec.output),
    }
    return run.model_copy(update={"spec": spec.model_copy(update=changed)})


class _Origins:
    """Source and line of each row in plan order, from the runs of lines in the plan: R runs, mostly one a unit."""

    def __init__(self, plan: Plan) -> None:
        runs = [(unit.source, first, count) for unit in plan.candidates for first, count in unit.lines]
        sources, first_lines, counts = np.array(runs, np.int64).T
        self.names = pa.array(plan.sources)
        self.source_R, self.line_R = sources.astype(np.int32), first_lines
        self.start_R = np.cumsum(counts) - counts

    def of(self, places: NDArray[Any]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        run = np.searchsorted(self.start_R, places, side="right") - 1
        return self.source_R[run], self.line_R[run] + (places - self.start_R[run])

    def columns(self, places: NDArray[Any]) -> dict[str, Any]:
        sources, lines = self.of(places)
        return {"source": pa.DictionaryArray.from_arrays(pa.array(sources), self.names), "line": lines}


def _id_column(ids_N: NDArray[Any]) -> Any:
    return pa.array(shards.hex_array(ids_N)).cast(pa.string())


def _selected_parts(origins: _Origins, found: Reduced) -> Iterator[dict[str, Any]]:
    scored, order = found.scored, found.chosen.order
    for part in parts(len(order)):
        places = order[part]
        yield {
            "example_id": _id_column(scored.ids.at(places)),
            **origins.columns(places),
            "score": found.scores.at(places),
            "num_tokens": scored.tokens.at(places),
        }


def _score_parts(origins: _Origins, found: Reduced) -> Iterator[dict[str, Any]]:
    scored, chosen = found.scored, found.chosen
    by_set = {f"score_{name}": column for name, column in zip(found.set_names, scored.scores, strict=True) if name}
    for part in parts(len(found.scores)):
        unusable = ~scored.usable_N[part]
        yield {
            "example_id": _id_column(scored.ids.part(part)),
            **origins.columns(np.arange(part.start, part.stop)),
            "score": pa.array(found.scores.part(part), mask=unusable),
            **{name: pa.array(column.part(part), mask=unusable) for name, column in by_set.items()},
            "nll": pa.array(scored.nll.part(part), mask=unusable),
            "norm": pa.array(scored.norm.part(part), mask=unusable),
            "num_tokens": scored.tokens.part(part),
            "selected": chosen.selected_N[part],
            "duplicate": chosen.duplicate_N[part],
        }


def _by_source(origins: _Origins, among_N: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How many of these rows each source holds."""
    counts_S = np.zeros(len(origins.names), np.int64)
    for part in parts(len(among_N)):
        sources, _ = origins.of(part.start + np.flatnonzero(among_N[part]))
        counts_S += np.bincount(sources, minlength=len(counts_S))
    return counts_S


@dataclass(frozen=True)
class Reduced:
    """All that reduction found, to be published: of the targets, of each candidate, what the budget took, and how well.

    `scores`: combined over the target sets; those of each set alone are `scored.scores`.
    `evaluation`: what `evaluate.compare` says, where the document asks for it.
    """

    run: SelectionRun
    plan: Plan
    store: Store
    targets: Targets
    scored: Scored
    scores: Column
    chosen: Selected
    curvature: dict[str, Any]
    audit: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None

    @property
    def set_names(self) -> list[str]:
        """Of the target sets; one "" where they are not named."""
        return [one.name for one in self.run.spec.targets.as_sets()]

    @property
    def quarantine(self) -> list[Quarantined]:
        return [*self.plan.quarantine, *self.scored.quarantined]

    @property
    def known_preference(self) -> NDArray[np.float64]:
        """π of the pairs that have one."""
        return self.targets.preference_Q[~np.isnan(self.targets.preference_Q)]


def publish(found: Reduced, output: Store, folder: str) -> dict[str, Any]:
    """Write and put all files of the selection, the manifest last. Returns the outcome.

    The long tables go through a scratch folder (TMPDIR), a row group at a time.
    """
    origins = _Origins(found.plan)
    with tempfile.TemporaryDirectory(prefix="prism-") as scratch:
        # Before the tables: here is room for a copy of the scores.
        document = _document(found, folder)
        files = _tables(found, origins, Path(scratch))
        replaying = yaml.safe_dump(document.spec.to_document(), sort_keys=False, allow_unicode=True)
        files |= {
            "quarantine.jsonl": "".join(entry.model_dump_json() + "\n" for entry in found.quarantine).encode(),
            "plan.json": found.plan.settled().model_dump_json(indent=1).encode(),
            "spec.yaml": replaying.encode(),
            "report.html": render(_report(found, origins, document)).encode(),
        }
        return manifest.publish(output, folder, files, document)


def _tables(found: Reduced, origins: _Origins, scratch: Path) -> dict[manifest.FileName, bytes | Path]:
    targets = found.targets
    in_sets = {"set": np.array(found.set_names)[targets.set_Q]} if found.run.spec.targets.sets else {}
    target_columns = {
        "example_id": targets.ids,
        **in_sets,
        "preference": pa.array(targets.preference_Q, from_pandas=True),
        "weight": targets.weight_Q,
        "contribution": targets.contribution_Q,
        "chosen_mean_nll": targets.chosen_nll_Q,
        "rejected_mean_nll": pa.array(targets.rejected_nll_Q, from_pandas=True),
    }
    columns: dict[manifest.FileName, Iterable[dict[str, Any]]] = {
        "selected.parquet": _selected_parts(origins, found),
        "scores.parquet": _score_parts(origins, found),
        "targets.parquet": [target_columns],
    }
    return {name: manifest.write_table(scratch / name, parts_of) for name, parts_of in columns.items()}


def _document(found: Reduced, folder: str) -> manifest.Manifest:
    plan, scored, chosen = found.plan, found.scored, found.chosen
    usable_N = scored.usable_N
    counts = manifest.Counts(
        candidates=len(usable_N) + len(plan.quarantine),
        quarantined=len(found.quarantine),
        duplicates=int(chosen.duplicate_N.sum()),
        taken_by_budget=chosen.num_taken,
        selected=len(chosen.order),
        selected_tokens=sum(
            int(scored.tokens.part(part).sum(dtype=np.int64, where=chosen.selected_N[part]))
            for part in parts(len(usable_N))
        ),
        tokens=sum(int(scored.tokens.part(part).sum(dtype=np.int64)) for part in parts(len(usable_N))),
        target_pairs=len(found.targets.ids),
        units=len(plan.candidates),
    )
    return manifest.Manifest(
        run=found.run.metadata.name,
        selection_id=folder.rpartition("/")[2],
        spec=_replaying(found.run, plan),
        extractor=plan.extractor,
        extractor_parts=plan.extractor_parts,
        work=plan.work_digest(),
        counts=counts,
        threshold=chosen.threshold,
        scores=manifest.summary(found.scores.part(slice(0, len(usable_N)))[usable_N]),
        preference=manifest.summary(found.known_preference.copy()),
        target_sets=_target_sets(found),
        curvature=found.curvature,
        evaluation=found.evaluation,
        audit=found.audit,
        code_version=__version__,
    )


def _target_sets(found: Reduced) -> list[manifest.TargetSetFacts]:
    targets, facts = found.targets, []
    for place, one in enumerate(found.run.spec.targets.sets or ()):
        among_Q = targets.set_Q == place
        known_Q = among_Q & ~np.isnan(targets.preference_Q)
        facts.append(
            manifest.TargetSetFacts(
                name=one.name,
                pairs=int(among_Q.sum()),
                weight=one.weight,
                sign=one.sign,
                preference=manifest.summary(targets.preference_Q[known_Q]),
                norm=float(np.linalg.norm(targets.directions_KLPP[place])),
                share=float(targets.contribution_Q[among_Q].sum()),
            )
        )
    return facts


def _report(found: Reduced, origins: _Origins, document: manifest.Manifest) -> Report:
    plan, scored, chosen, spec = found.plan, found.scored, found.chosen, found.run.spec
    return Report(
        run=document.run,
        selection_id=document.selection_id,
        model=spec.model.uri,
        settings={
            "weighting": spec.scoring.weighting,
            "score": spec.scoring.score,
            "loss": spec.scoring.loss,
            "curvature": json.dumps(found.curvature),
            "selection": json.dumps(spec.selection.model_dump(mode="json", exclude_none=True)),
            "extractor": plan.extractor,
        },
        counts=document.counts.model_dump(),
        threshold=chosen.threshold,
        action=f"drop {spec.selection.drop}" if spec.selection.drop else f"keep {spec.selection.keep}",
        scores=found.scores,
        usable=scored.usable_N,
        summary=document.scores,
        selected=chosen.selected_N,
        preference=found.known_preference,
        contribution=found.targets.contribution_Q,
        sets=[
            ShownSet(one.name, one.pairs, one.sign * one.weight, one.preference.get("mean"), one.norm, one.share)
            for one in document.target_sets
        ],
        pairs=_shown_pairs(plan, found.store, found.targets),
        sources=plan.sources,
        usable_by_source=_by_source(origins, scored.usable_N),
        selected_by_source=_by_source(origins, chosen.selected_N),
        highest=_shown(found, origins, chosen.highest),
        lowest=_shown(found, origins, chosen.lowest),
        quarantine=[(entry.source, entry.line, entry.reason) for entry in found.quarantine],
        ignored=plan.ignored,
        evaluation=found.evaluation,
        audit=found.audit,
    )


def _shown(found: Reduced, origins: _Origins, places: list[int]) -> list[ShownExample]:
    plan = found.plan
    sources, lines = origins.of(np.array(places, np.int64))
    scores = found.scores.at(np.array(places, np.int64)).tolist()
    return [
        ShownExample(
            score=score,
            source=plan.sources[source],
            line=line,
            selected=bool(found.chosen.selected_N[place]),
            text=examples.shown_text(examples.candidate_content(_row_at(plan.candidates, place, found.store))),
        )
        for place, score, source, line in zip(places, scores, sources.tolist(), lines.tolist(), strict=True)
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
            return staged_rows.read_rows(store, unit.rows)[place]
        place -= unit.num_rows
    raise IndexError(place)
