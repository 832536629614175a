"""The groups that share a budget: which group each row belongs to, and what each may take at most and must get at least.

Shapes: N rows in plan order, G groups.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_job.data.labels import group_of
from prism_job.plan.checks import most_of_a_group
from prism_job.plan.plan import Plan
from prism_job.score.column import Column, parts
from prism_job.spec.ranking import SelectionSpec, SharesSpec
from prism_job.storage.objects import Store
from prism_job.store import staged_rows

Amounts = NDArray[np.int64]
"""Of each group, in the budget's unit: rows, or response tokens."""


@dataclass
class Groups:
    """The group of each row. In memory: the names, and 4 bytes a row while `index_N` is in use."""

    shares: SharesSpec
    where: str  # the field of the document, for messages
    names: list[str | None] = field(default_factory=list)  # None: the rows without a value
    of: Column = field(default_factory=lambda: Column("u4"))  # index in `names`, in plan order

    def index_N(self) -> NDArray[np.uint32]:
        return self.of.part(slice(0, len(self.of)))


def read_groups(selection: SelectionSpec, plan: Plan, store: Store) -> Groups | None:
    """The group of each row of the plan; None where the document sets no shares. Reads staged rows unit by unit.

    Raises:
        RequestError: a value that is no group (the plan refuses it first).
        DataError: staged rows are missing or damaged.
    """
    if selection.shares is None:
        return None
    groups = Groups(selection.shares, selection.where_shares)
    if selection.per_group is None:
        groups.names = list(plan.sources)
        for unit in plan.candidates:
            groups.of.append(np.full(unit.num_rows, unit.source, np.uint32))
        return groups
    column = selection.per_group.group_by
    number_of: dict[str | None, int] = {}
    for unit in plan.candidates:
        lines = zip(unit.line_numbers(), staged_rows.read_rows(store, unit.rows), strict=True)
        names = [group_of(row, column, f"{plan.sources[unit.source]} line {line}") for line, row in lines]
        groups.of.append(np.array([number_of.setdefault(name, len(number_of)) for name in names], np.uint32))
    groups.names = list(number_of)
    return groups


def sizes(
    index_N: NDArray[np.uint32], weight_N: NDArray[np.int32] | None, among_N: NDArray[np.bool_], num: int
) -> Amounts:
    """What the rows of each group weigh together: their number, or their tokens. int64 [G]."""
    size_G = np.zeros(num, np.int64)
    for part in parts(len(index_N)):
        among = among_N[part]
        # Sums of int32 in float64: exact, up to 2^53 tokens.
        weights = None if weight_N is None else weight_N[part][among]
        size_G += np.bincount(index_N[part][among], weights, num).astype(np.int64)
    return size_G


def limits(groups: Groups, size_G: Amounts, budget: int, in_tokens: bool) -> tuple[Amounts, Amounts]:
    """What each group gets in any case, and what it takes at most. int64 [G] each.

    max is rounded up to whole rows and min down, so that shares which fit together also fit in rows. A group that has
    less than its min gets all it has. Tokens are never exceeded.

    Raises RequestError: the groups cannot fill the budget.
    """
    cap = most_of_a_group(groups.shares, groups.where, size_G.tolist(), budget, in_tokens)
    return np.minimum(size_G, least(groups, budget)), np.full(len(size_G), cap, np.int64)


def least(groups: Groups, budget: int) -> int:
    """What `min` promises a group, in whole rows or tokens."""
    return 0 if groups.shares.min is None else math.floor(Fraction(repr(groups.shares.min)) * budget)


def moved(
    groups: Groups,
    index_N: NDArray[np.uint32],
    weight_N: NDArray[np.int32] | None,
    pool_N: NDArray[np.bool_],
    plain_N: NDArray[np.bool_],
    taken_N: NDArray[np.bool_],
    least: int,
) -> list[dict[str, Any]]:
    """What the limits did, a plain mapping for each group that has a row in the pool, the largest first.

    `pool`, `without` and `with`: rows, or tokens, of the group in the pool, in the budget without the document's rules, and
    with them. `entered` and `left`: rows that the rules brought into the budget, and that they took out. `below_min`: the group
    has fewer rows, or tokens, than `least`, and gave all of them.

    Args:
        plain_N, taken_N: the rows that the budget takes without and with the rules.
    """
    num = len(groups.names)
    columns = {
        "pool": sizes(index_N, weight_N, pool_N, num),
        "without": sizes(index_N, weight_N, plain_N, num),
        "with": sizes(index_N, weight_N, taken_N, num),
        "entered": sizes(index_N, None, taken_N & ~plain_N, num),
        "left": sizes(index_N, None, plain_N & ~taken_N, num),
    }
    below_G = columns["pool" if weight_N is not None else "with"] < least  # tokens end with a whole row, a little below
    order = np.argsort(-columns["pool"], kind="stable")
    return [
        {
            "group": groups.names[one],
            **{name: int(of[one]) for name, of in columns.items()},
            "below_min": bool(below_G[one]),
        }
        for one in order[columns["pool"][order] > 0].tolist()
    ]
