"""The rankings that PRISM's is compared with: each candidate's own loss and length, the same run with another score or another
weighting of the pairs, and BM25 to the wanted responses. Does not read labels.

Shapes: A rows of the plan, N ranked ones, K target sets.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_job.data import examples
from prism_job.errors import DataError
from prism_job.evaluate.bm25 import MAX_WORDS, bm25, words_of
from prism_job.plan.plan import Plan
from prism_job.score.candidates import score_units, weighted_sum
from prism_job.score.direction import fold_directions
from prism_job.score.targets import weigh_targets
from prism_job.spec.document import RunSpec
from prism_job.storage.objects import Store
from prism_job.store import staged_rows

Float64 = NDArray[np.float64]

OTHER_SCORE = {"influence": "cosine", "cosine": "influence"}
OTHER_WEIGHTING = {"preference": "uniform", "uniform": "preference"}
NO_GRADIENTS = "the rows of this run are no gradients"


@dataclass(frozen=True)
class Outcome:
    """A selection's result for each row, in plan order."""

    ranked_A: NDArray[np.bool_]  # which of the plan's rows were ranked; the other fields cover these rows alone
    score_N: Float64
    nll_N: Float64  # own losses, token sums
    norm_N: NDArray[np.float32]  # of the gradient of the token sum, projected
    tokens_N: NDArray[np.int32]  # response tokens
    selected_N: NDArray[np.bool_]  # rows of the subset
    preference_Q: Float64  # π, nan where a pair has none
    num_taken: int  # rows the budget took, kept or dropped


@dataclass(frozen=True)
class Rival:
    """A ranking of the N rows in which good ones should be high, or the reason why there is none."""

    name: str  # for people
    prefix: str  # how the names of its figures begin
    ranking_N: Float64 | None
    reason: str | None = None

    def facts(self) -> dict[str, Any]:
        return {"name": self.name, "prefix": self.prefix, "reason": self.reason}


def rivals(outcome: Outcome, plan: Plan, store: Store, spec: RunSpec, sign: float) -> Iterator[Rival]:
    """One after the other, so that memory need not hold all of them. Another weighting of the pairs reads every shard of the
    run once more, and BM25 every staged row.

    Args:
        sign: 1 where the selection calls high scores good, -1 where it calls them bad; scores and BM25 are multiplied by it.
            The loss is not: a good candidate has a low one.

    Raises DataError: staged rows are missing or damaged.
    """
    yield Rival("own loss, token mean", "loss_", -outcome.nll_N / outcome.tokens_N)
    yield Rival("own loss, sum", "loss_sum_", -outcome.nll_N)
    yield Rival("length, longest first", "length_", outcome.tokens_N.astype(np.float64))
    yield _other_score(outcome, spec, sign)
    yield _other_weighting(outcome, plan, store, spec, sign)
    yield _bm25(outcome, plan, store, spec, sign)


def _other_score(outcome: Outcome, spec: RunSpec, sign: float) -> Rival:
    """What `scoring.score: cosine` gives, or `influence` where the run is by cosine. From the run's own scores and norms."""
    other = OTHER_SCORE.get(spec.scoring.score)
    if other is None:
        return Rival("score: cosine", "cosine_", None, NO_GRADIENTS)
    norm_N = outcome.norm_N.astype(np.float64)
    # What an influence score is divided by (score/scorers.py).
    tokens_N = outcome.tokens_N.astype(np.float64) if spec.scoring.loss == "mean" else np.ones(len(norm_N))
    score_N = outcome.score_N
    if other == "cosine":
        score_N = np.divide(score_N * tokens_N, norm_N, out=np.zeros_like(score_N), where=norm_N > 0)
    else:
        score_N = score_N * norm_N / tokens_N
    return Rival(f"score: {other}", f"{other}_", sign * score_N)


def _other_weighting(outcome: Outcome, plan: Plan, store: Store, spec: RunSpec, sign: float) -> Rival:
    """What `scoring.weighting: uniform` gives, or `preference` where the run is uniform."""
    other = OTHER_WEIGHTING[spec.scoring.weighting]
    # `preference_…` are figures of π.
    name, prefix = f"weighting: {other}", "uniform_" if other == "uniform" else "weighted_"
    if spec.scoring.score not in OTHER_SCORE:
        return Rival(name, prefix, None, NO_GRADIENTS)
    if other == "preference" and np.isnan(outcome.preference_Q).any():
        return Rival(name, prefix, None, "a target pair has no rejected response, so it has no π")
    spec = spec.model_copy(update={"scoring": spec.scoring.model_copy(update={"weighting": other})})
    signed_weights = [sign * target_set.signed_weight for target_set in spec.targets.as_sets()]
    ranking_N, position, start = np.empty(len(outcome.score_N)), 0, 0
    try:
        targets = weigh_targets(spec, plan, store)
        directions_KD, _ = fold_directions(spec, plan, store, targets.layers, targets.directions_KLPP)
        for unit in score_units(spec, store, plan.extractor, plan.candidates, targets.layers, directions_KD):
            ranked = outcome.ranked_A[start : start + len(unit.tokens)]
            score_N = weighted_sum(unit.scores, signed_weights)[ranked]
            ranking_N[position : position + len(score_N)] = score_N
            position, start = position + len(score_N), start + len(ranked)
    except DataError as error:  # the store was cleared since: `prism store prune`
        return Rival(name, prefix, None, f"the store does not hold the run's rows any more ({error.what})")
    return Rival(name, prefix, ranking_N)


def _bm25(outcome: Outcome, plan: Plan, store: Store, spec: RunSpec, sign: float) -> Rival:
    """The mean of BM25 of a candidate's text, prompt and response, to the chosen response of each pair.

    Of several target sets it is Σ_k sign_k weight_k times the mean of each, as for scores.
    """
    name, prefix = "BM25 to wanted responses", "bm25_"
    ranking_N = bm25(_candidate_texts(outcome, plan, store, spec), _wanted_words(plan, store, spec))
    if ranking_N is None:
        return Rival(name, prefix, None, f"the candidates have more than {MAX_WORDS:,} words")
    return Rival(name, prefix, sign * ranking_N)


def _candidate_texts(outcome: Outcome, plan: Plan, store: Store, spec: RunSpec) -> Iterator[str]:
    is_ranked = iter(outcome.ranked_A.tolist())
    for unit in plan.candidates:
        for row in staged_rows.read_rows(store, unit.rows):
            if next(is_ranked):
                yield examples.as_text(examples.candidate_content(row, spec.candidates.columns))


def _wanted_words(plan: Plan, store: Store, spec: RunSpec) -> dict[str, float]:
    """Word of a chosen response -> how often it stands in the mean one, times the weight and sign of its set; words sorted."""
    columns_of, signed_weight_of = spec.targets.columns_by_set(), {}
    num_pairs: Counter[str] = Counter()
    for unit in plan.targets:
        num_pairs[plan.target_sets[unit.source]] += unit.num_rows
    for target_set in spec.targets.as_sets():
        signed_weight_of[target_set.name] = target_set.signed_weight
    weight_of: defaultdict[str, float] = defaultdict(float)
    for unit in plan.targets:
        name = plan.target_sets[unit.source]
        for row in staged_rows.read_rows(store, unit.rows):
            chosen = examples.target_content(row, False, columns_of[name])["chosen"]
            for word in words_of(examples.as_text({"chosen": chosen})):
                weight_of[word] += signed_weight_of[name] / num_pairs[name]
    return dict(sorted(weight_of.items()))
