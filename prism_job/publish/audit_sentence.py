"""The audit's figures as one or two English sentences, for the end of a run and the report."""

from prism_job.evaluate.audit import LOW_AGREEMENT, Figures

NOTHING_TO_AUDIT = (
    "none: rows of hidden states are not projected, so there is no noise of a projection to measure. To see whether the "
    "ranking suits the task, compare it with labels or with held-out examples."
)


def audit_sentence(figures: Figures) -> str:
    """The figures of a manifest as a sentence or two."""
    if is_noise(figures):
        between = _shown(figures, "spearman_between", ".3f")
        stated = "How well the ranking agrees with exact scores is not known: "
        stated += f"its Spearman with the audit's ranking, {between}, cannot be distinguished from noise."
    elif figures["spearman"] is None:
        return f"How well the ranking agrees with exact scores is not known: {figures['reason']}."
    else:
        stated = f"The ranking agrees with exact scores at Spearman {_shown(figures, 'spearman', '.3f')}"
        if figures["overlap"] is None:
            stated += (
                f". How many of the budget's rows exact scores would take as well is not known: {figures['reason']}."
            )
        else:
            stated += f"; exact scores would take {_shown(figures, 'overlap', '.0%')} of the budget's rows as well."
    return f"{stated} Raise extraction.projection.dim or extraction.codec.dims." if is_low(figures) else stated


def is_noise(figures: Figures) -> bool:
    """Whether two rankings of noise alone may agree as these do: their interval holds 0."""
    return figures["spearman_between_low"] is not None and bool(figures["spearman_between_low"] <= 0)


def is_low(figures: Figures) -> bool:
    """Whether the agreement with exact scores may lie under LOW_AGREEMENT, or is not known."""
    return figures["spearman"] is None or bool(figures["spearman_low"] < LOW_AGREEMENT)


def _shown(figures: Figures, name: str, form: str) -> str:
    value, low, high = (format(figures[f"{name}{end}"], form) for end in ("", "_low", "_high"))
    return f"{value} ({low} to {high})"
