"""What a person should know before trusting a selection, as English sentences: for the end of a run, its status, the report."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_job.publish.reduced import Reduced

STANDARD_ERRORS = 2
"""½ is where π stops helping: below it a model trusts swapped pairs more than right ones. Mean π counts as near ½ where so many
standard errors of the mean, about its 95 % interval over the pairs, reach it: it is then not known to be above."""


def warnings_of(reduced: Reduced) -> list[str]:
    """Some sentences for each target set whose mean π is not known to be above ½, and where a label contradicts the ranking."""
    return [*_of_preference(reduced), *_of_label(reduced.evaluation or {})]


def _of_label(figures: dict[str, Any]) -> list[str]:
    """Pairs that are all swapped turn the ranking round. π shows it only where its model prefers the right responses."""
    if figures.get("auroc") is None or figures["auroc_high"] >= 0.5:
        return []
    return [
        f"the ranking is the reverse of the label '{figures['label']}': AUROC {figures['auroc']:.3f}, 95 % interval "
        f"{figures['auroc_low']:.3f} to {figures['auroc_high']:.3f}. Check whether chosen and rejected are swapped in the "
        "targets, which end spec.selection keeps or drops, and which value of the label is good (evaluation.positive)."
    ]


def _of_preference(reduced: Reduced) -> list[str]:
    scoring, targets = reduced.run.spec.scoring, reduced.targets
    if scoring.weighting != "preference":
        return []
    found = []
    for number, name in enumerate(reduced.set_names):
        preference_Q = targets.preference_Q[targets.set_Q == number]
        if is_near_half(preference_Q):
            of_set = f" of the set {name}" if name else ""
            found.append(
                _sentences(float(preference_Q.mean()), len(preference_Q), of_set, scoring.preference_model is not None)
            )
    return found


def is_near_half(preference_Q: NDArray[np.float64]) -> bool:
    """Whether the mean may be ½ or less."""
    error = float(preference_Q.std(ddof=1)) / len(preference_Q) ** 0.5 if len(preference_Q) > 1 else 0.0
    return float(preference_Q.mean()) - STANDARD_ERRORS * error <= 0.5


def _sentences(mean: float, num_pairs: int, of_set: str, is_other_model: bool) -> str:
    model = "the preference model" if is_other_model else "the model"
    what = (
        f"mean π is {mean:.2f} over {num_pairs:,} pairs{of_set}: {model} does not clearly prefer the chosen responses, so "
        "π may trust wrong pairs more than right ones. "
    )
    swapped = "Check that chosen and rejected are not swapped"
    if is_other_model:
        return f"{what}{swapped}, or name another scoring.preferenceModel."
    other = "set scoring.preferenceModel to a model that prefers the chosen ones: a larger one, or this one before it was tuned"
    return f"{what}{swapped}, or {other}."
