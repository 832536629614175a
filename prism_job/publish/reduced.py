"""The result of reduction, to be published."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_job.evaluate.rivals import Outcome
from prism_job.plan.plan import Plan, Quarantined
from prism_job.publish.manifest import Used
from prism_job.score.candidates import Scored
from prism_job.score.column import Column
from prism_job.score.selection import Selected
from prism_job.score.targets import Targets
from prism_job.spec.document import SelectionRun
from prism_job.storage.objects import Store


@dataclass(frozen=True)
class Reduced:
    """The targets, the candidates' scores, the rows that the budget took, and how far the ranking can be trusted."""

    run: SelectionRun
    plan: Plan
    store: Store
    targets: Targets
    scored: Scored
    scores: Column  # combined over the target sets; those of each set alone are `scored.scores`
    chosen: Selected
    curvature: dict[str, Any]
    audit: dict[str, Any] | None = None
    contribution_EQ: NDArray[np.float64] | None = (
        None  # of `chosen.highest`, then `chosen.lowest`; None: too many pairs
    )
    used: Used | None = None
    evaluation: dict[str, Any] | None = None  # figures of `evaluate.comparison.compare`, where the document asks

    @property
    def set_names(self) -> list[str]:
        """Of the target sets; one "" where they are not named."""
        return [target_set.name for target_set in self.run.spec.targets.as_sets()]

    @property
    def quarantine(self) -> list[Quarantined]:
        return [*self.plan.quarantine, *self.scored.quarantined]

    @property
    def known_preference(self) -> NDArray[np.float64]:
        """π of the pairs that have one."""
        return self.targets.preference_Q[~np.isnan(self.targets.preference_Q)]

    def outcome(self) -> Outcome:
        """What labels are compared with. Holds columns of the ranked rows in memory."""
        scored, chosen = self.scored, self.chosen
        ranked_A = scored.usable_N & ~chosen.duplicate_N
        every = slice(0, len(ranked_A))
        return Outcome(
            ranked_A=ranked_A,
            score_N=self.scores.part(every)[ranked_A],
            nll_N=scored.nll.part(every)[ranked_A],
            norm_N=scored.norm.part(every)[ranked_A],
            tokens_N=scored.tokens.part(every)[ranked_A],
            selected_N=chosen.selected_N[ranked_A],
            preference_Q=self.targets.preference_Q,
            num_taken=chosen.num_taken,
        )
