"""The verb `evaluate`: a published selection compared with labels that its rows carry."""

from typing import Any

from prism_job.evaluate.comparison import compare
from prism_job.evaluate.rivals import Outcome
from prism_job.publish.published import Published, load
from prism_job.spec.ranking import EvaluationSpec
from prism_job.storage.address import open_store


def evaluate(
    manifest_uri: str, label: str | None = None, positive: str | None = None, target_label: str | None = None
) -> dict[str, Any]:
    """The figures of `compare` for a published selection.

    Args:
        label: column of the candidates; without it that of the run's own document, else `label`.
        positive, target_label: as in `spec.evaluation`; without them those of the run's own document, except that `positive`
            holds for the document's own label column only.

    Raises:
        RequestError: no such column, values that are not of two kinds, or all labels equal.
        DataError: the selection is damaged.
    """
    published = load(manifest_uri)
    spec, outcome = published.manifest.spec.spec, outcome_of(published)
    evaluation = spec.evaluation or EvaluationSpec(label="label")
    if label not in (None, evaluation.label):
        evaluation = evaluation.model_copy(update={"label": label, "positive": None})
    options = {"positive": positive, "target_label": target_label}
    evaluation = evaluation.model_copy(update={name: value for name, value in options.items() if value is not None})
    figures = compare(outcome, published.plan(), open_store(spec.store), spec, evaluation)
    return figures | {"selection_id": published.manifest.selection_id}


def outcome_of(published: Published) -> Outcome:
    """What labels are compared with, from the tables."""
    scores = published.table("scores.parquet")
    ranked_A = scores["score"].is_valid().to_numpy() & ~scores["duplicate"].to_numpy()
    return Outcome(
        ranked_A=ranked_A,
        score_N=scores["score"].to_numpy()[ranked_A],
        nll_N=scores["nll"].to_numpy()[ranked_A],
        norm_N=scores["norm"].to_numpy()[ranked_A],
        tokens_N=scores["num_tokens"].to_numpy()[ranked_A],
        selected_N=scores["selected"].to_numpy()[ranked_A],
        preference_Q=published.table("targets.parquet")["preference"].to_numpy(),
        num_taken=published.manifest.counts.taken_by_budget,
    )
