"""The contents of the report, all that the page shows as plain data, gathered from the result of reduction.

Shapes: N candidates in plan order, Q target pairs, S sources.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_job.plan.plan import Quarantined, SourceLayout
from prism_job.publish.manifest import Manifest, TargetSetFacts
from prism_job.publish.origins import Origins
from prism_job.publish.reduced import Reduced
from prism_job.publish.texts import example_texts, pair_texts
from prism_job.score.column import Column
from prism_job.spec.used import used_text

Float64 = NDArray[np.float64]

NUM_PAIRS = 3
"""Target pairs shown in the report, those of the largest share in the direction."""

NUM_BEHIND = 2
"""Target pairs shown beside each example, those that its score comes from most."""


@dataclass(frozen=True)
class PairBehind:
    """A pair that an example's score comes from. `number`: its row in targets.parquet, from 1."""

    number: int
    contribution: float
    text: str


@dataclass(frozen=True)
class ShownExample:
    """One example as the report shows it."""

    score: float
    source: str
    line: int
    selected: bool
    text: str
    pairs: list[PairBehind] = field(default_factory=list)  # those of the largest contributions; empty: not computed


@dataclass(frozen=True)
class ShownPair:
    """One target pair as the report shows it. `number`: its row in targets.parquet, from 1. `share` of the direction."""

    number: int
    share: float
    text: str


@dataclass(frozen=True)
class Report:
    """All that the page shows."""

    run: str
    selection_id: str
    model: str
    settings: dict[str, str | dict[str, Any]]
    counts: dict[str, int]
    threshold: float | None  # score of the last row that the budget took; None where it took none
    action: str  # the verb and the end, such as "drop lowest"
    scores: Column  # finite, float64 [N]; the `usable` ones count, the `selected` ones are chosen
    usable: NDArray[np.bool_]
    summary: dict[str, float]  # `manifest.summary` of the usable scores
    selected: NDArray[np.bool_]
    preference: Float64  # π of the pairs that have one, [at most Q]
    contribution: Float64  # share of each pair in the direction, [Q]; sums to 1, all zero without one, NaN: see `score`
    sets: list[TargetSetFacts]
    pairs: list[ShownPair]  # those of the largest shares, largest first
    sources: list[str]
    usable_by_source: NDArray[np.int64]  # how many each source holds: [S]
    selected_by_source: NDArray[np.int64]
    highest: list[ShownExample]
    lowest: list[ShownExample]
    quarantine: list[Quarantined]
    ignored: list[str]
    layouts: list[SourceLayout] = field(default_factory=list)  # of the sources, and of the files of targets
    target_layouts: list[SourceLayout] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None  # as in the manifest
    audit: dict[str, Any] | None = None
    no_audit: str | None = None  # why there can be none
    rules: dict[str, Any] | None = None
    diff: dict[str, Any] | None = None  # to the selection before it (compare/diff.py), or the reason why not
    warnings: list[str] = field(default_factory=list)
    preference_model: str = ""  # address; "": π is the reference's own
    reference_preference: float | None = None  # mean π of the reference, where π is not its own

    @property
    def num_usable(self) -> int:
        return int(self.usable.sum())


def gather(reduced: Reduced, origins: Origins, manifest: Manifest, diff: dict[str, Any] | None = None) -> Report:
    """The report's contents. Reads the shown examples and pairs from the store."""
    plan, scored, chosen, spec, used = reduced.plan, reduced.scored, reduced.chosen, reduced.run.spec, reduced.used
    shown = _shown_examples(reduced, origins, [*chosen.highest, *chosen.lowest])
    return Report(
        run=manifest.run,
        selection_id=manifest.selection_id,
        model=str(spec.model),
        settings={
            "weighting": spec.scoring.weighting,
            "score": spec.scoring.score,
            "loss": spec.scoring.loss,
            **({"similarity": spec.scoring.similarity} if spec.scoring.similarity else {}),
            "curvature": reduced.curvature,
            "selection": spec.selection.model_dump(mode="json", exclude_none=True),
            "layers": manifest.layers,
            "extractor": plan.extractor,
            **({"used": used_text(used.gpu_hours, used.gpu, used.price)} if used and used.gpu_hours else {}),
        },
        counts=manifest.counts.model_dump(),
        threshold=chosen.threshold,
        action=f"drop {spec.selection.drop}" if spec.selection.drop else f"keep {spec.selection.keep}",
        scores=reduced.scores,
        usable=scored.usable_N,
        summary=manifest.scores,
        selected=chosen.selected_N,
        preference=reduced.known_preference,
        contribution=reduced.targets.contribution_Q,
        sets=manifest.target_sets,
        pairs=_shown_pairs(reduced),
        sources=plan.sources,
        usable_by_source=origins.count_by_source(scored.usable_N),
        selected_by_source=origins.count_by_source(chosen.selected_N),
        highest=shown[: len(chosen.highest)],
        lowest=shown[len(chosen.highest) :],
        quarantine=reduced.quarantine,
        ignored=plan.ignored,
        layouts=plan.layouts,
        target_layouts=plan.target_layouts,
        evaluation=reduced.evaluation,
        audit=reduced.audit,
        no_audit=manifest.audit_sentence if spec.scoring.is_forward_only else None,
        rules=manifest.rules,
        diff=diff,
        warnings=manifest.warnings,
        preference_model=str(spec.scoring.preference_model or ""),
        reference_preference=manifest.preference_model.reference["mean"] if manifest.preference_model else None,
    )


def _shown_examples(reduced: Reduced, origins: Origins, rows: list[int]) -> list[ShownExample]:
    plan = reduced.plan
    texts = example_texts(reduced.run.spec, plan, reduced.store, rows)
    sources, lines = origins.of(np.array(rows, np.int64))
    scores = reduced.scores.at(np.array(rows, np.int64)).tolist()
    return [
        ShownExample(
            score=score,
            source=plan.sources[source],
            line=line,
            selected=bool(reduced.chosen.selected_N[row]),
            text=text,
            pairs=pairs,
        )
        for row, score, source, line, text, pairs in zip(
            rows, scores, sources.tolist(), lines.tolist(), texts, _pairs_behind(reduced, rows), strict=True
        )
    ]


def _pairs_behind(reduced: Reduced, rows: list[int]) -> list[list[PairBehind]]:
    if reduced.contribution_EQ is None:
        return [[] for _ in rows]
    largest_E2 = np.argsort(-np.abs(reduced.contribution_EQ), axis=1, kind="stable")[:, :NUM_BEHIND]
    pairs = np.unique(largest_E2).tolist()
    text_of = dict(zip(pairs, pair_texts(reduced.run.spec, reduced.plan, reduced.store, pairs), strict=True))
    return [
        [PairBehind(pair + 1, float(of_pairs_Q[pair]), text_of[pair]) for pair in largest]
        for of_pairs_Q, largest in zip(reduced.contribution_EQ, largest_E2.tolist(), strict=True)
    ]


def _shown_pairs(reduced: Reduced) -> list[ShownPair]:
    share_Q = reduced.targets.contribution_Q
    largest = np.argsort(-share_Q, kind="stable")[:NUM_PAIRS].tolist()
    texts = pair_texts(reduced.run.spec, reduced.plan, reduced.store, largest)
    return [ShownPair(row + 1, float(share_Q[row]), text) for row, text in zip(largest, texts, strict=True)]
