"""Whether the candidates can serve the budget, as far as that is known before they are ranked."""

from array import array
from collections.abc import Sequence

import numpy as np

from prism_job.plan.checks import most_of_a_group, nothing_selected, refuse_short_budget
from prism_job.spec.ranking import SelectionSpec


class BudgetCheck:
    """Keeps the id and the group of each candidate in plan order, 20 bytes a row."""

    def __init__(self, selection: SelectionSpec) -> None:
        self.selection = selection
        self.ids, self.groups = bytearray(), array("i")
        self.number_of: dict[str | int | None, int] = {}

    def add(self, example_id: str, group: str | int | None) -> None:
        self.ids.extend(bytes.fromhex(example_id))
        self.groups.append(self.number_of.setdefault(group, len(self.number_of)))

    def check(self, supervised: Sequence[int], *, is_exact: bool) -> None:
        """Raises RequestError where no ranking of these rows could serve the budget, with the words of the reduce stage.

        Args:
            supervised: tokens with loss of each row; 0: unusable.
            is_exact: without it, some were not counted: these rows count as usable, and only what is certain is refused.
        """
        budget, shares = self.selection.budget, self.selection.shares
        tokens = np.array(supervised, np.int64)
        rows = np.flatnonzero(tokens)
        if self.selection.dedupe != "none":
            rows = rows[np.sort(np.unique(np.frombuffer(self.ids, "S16")[rows], return_index=True)[1])]
        num_tokens = int(tokens[rows].sum()) if is_exact else None
        refuse_short_budget(budget, len(rows), num_tokens)
        num_taken = budget.num_taken(len(rows))
        if is_exact and not budget.tokens and num_taken == (0 if self.selection.keep else len(rows)):
            raise nothing_selected(num_taken, len(rows))
        if shares and (is_exact or budget.count):
            weights = tokens[rows] if budget.tokens else None
            size_G = np.bincount(np.array(self.groups)[rows], weights)
            sizes = [int(size) for size in size_G]
            most_of_a_group(
                shares, self.selection.where_shares, sizes, budget.tokens or num_taken, budget.tokens is not None
            )
