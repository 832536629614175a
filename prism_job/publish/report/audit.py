"""The section of the audit: how far the ranking can be trusted."""

from typing import Any

from prism_job.publish.audit_sentence import audit_sentence, is_low, is_noise
from prism_job.publish.report.markup import percent, safe


def audit_section(figures: dict[str, Any] | None, no_audit: str | None = None) -> str:
    """
    Args:
        figures: of the audit; None where there can be none, which `no_audit` explains.
    """
    if figures is None:
        return f'<p class="note">{safe(f"Audit: {no_audit}")}</p>'
    notes = [
        f"{figures['usable']:,} candidates, drawn by their ids, were extracted again with other random projections of "
        f"{figures['dim']} dims a side: {percent(figures['token_share'], 1)} of the response tokens of this run."
    ]
    if figures["spearman_between"] is not None:
        rho, share = f"{figures['spearman_between']:.3f}", percent(figures["overlap_between"], 1)
        notes.append(
            f"The two rankings agree at Spearman {rho}, and share {share} of the {figures['taken']:,} that the budget would "
            "take of these. Brackets hold 95 % intervals."
        )
        if not is_noise(figures):
            notes.append("Both are noisy, so each agrees better with the exact ranking than with the other.")
    notes.append(
        "This measures the noise of projection, folding and signs, not whether the targets or the model suit the task."
    )
    look = "warn" if is_low(figures) else "lead"
    return f'<p class="{look}">{safe(audit_sentence(figures))}</p><p class="note">{safe(" ".join(notes))}</p>'
