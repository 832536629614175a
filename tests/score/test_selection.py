"""Laws of the selection, against plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prism_job.errors import RequestError
from prism_job.score.column import Column
from prism_job.score.selection import Selected, select
from prism_job.spec.ranking import BudgetSpec, SelectionSpec


def selected_by_hand(
    scores: list[float], ids: list[bytes], tokens: list[int], usable: list[bool], spec: SelectionSpec, taken_of: Any
) -> tuple[list[int], set[int], int, float | None]:
    """(selected in order, duplicates, number taken, threshold), by plain loops."""
    pool: list[int] = []
    duplicates: set[int] = set()
    for place in range(len(scores)):
        if not usable[place]:
            continue
        if spec.dedupe == "exact" and any(ids[place] == ids[earlier] for earlier in pool):
            duplicates.add(place)
        else:
            pool.append(place)
    falling = sorted(pool, key=lambda place: (-scores[place], ids[place], place))
    rising = sorted(pool, key=lambda place: (scores[place], ids[place], place))
    ranked = falling if "highest" in (spec.keep, spec.drop) else rising
    taken: list[int] = []
    spent = 0
    for place in ranked:
        spent += tokens[place]
        if spec.budget.count is not None and len(taken) == spec.budget.count:
            break
        if spec.budget.fraction is not None and len(taken) == taken_of(len(ranked)):
            break
        if spec.budget.tokens is not None and spent > spec.budget.tokens:
            break
        taken.append(place)
    kept = [place for place in falling if (place in taken) == (spec.keep is not None)]
    return kept, duplicates, len(taken), scores[taken[-1]] if taken else None


def as_arrays(scores: list[float], ids: list[bytes], tokens: list[int], usable: list[bool]) -> tuple[Any, ...]:
    ids_N = np.frombuffer(b"".join(ids), np.uint8).reshape(-1, 16).copy().view("V16").reshape(-1)
    columns = Column("V16"), Column("i4")
    columns[0].append(ids_N)
    columns[1].append(np.array(tokens, np.int32))
    return np.array(scores, np.float64), *columns, np.array(usable, np.bool_)


IDS = [
    bytes(16),
    b"a" + bytes(15),
    b"a" + bytes(14) + b"\x01",
    bytes(15) + b"a",
    b"\xff" * 16,
    b"\x7f" + bytes(15),
    b"\x80" + bytes(15),
    b"0123456789abcdef",
]
"""Some differ only behind zero bytes, some in the highest bit."""

row_strategy = st.tuples(
    st.sampled_from([-2.5, -1.0, -0.0, 0.0, 1.0, 1.0 + 2**-52, 3e300]),
    st.sampled_from(IDS),
    st.sampled_from([1, 2, 3, 10]),  # few, so that a budget is often met exactly
    st.booleans(),
)
budget_strategy = st.one_of(
    st.builds(BudgetSpec, count=st.integers(1, 25)),
    st.builds(BudgetSpec, fraction=st.floats(0.001, 1)),
    st.builds(BudgetSpec, tokens=st.integers(1, 40)),
)


def selection_strategy() -> st.SearchStrategy[SelectionSpec]:
    ends, dedupe = st.sampled_from(["highest", "lowest"]), st.sampled_from(["exact", "none"])
    return st.one_of(
        st.builds(SelectionSpec, keep=ends, budget=budget_strategy, dedupe=dedupe),
        st.builds(SelectionSpec, drop=ends, budget=budget_strategy, dedupe=dedupe),
    )


def selected(rows: list[Any], spec: SelectionSpec) -> Selected | None:
    """What `select` makes of rows (score, id, tokens, usable); None where the budget asks for more than there is."""
    arrays = as_arrays(*([list(column) for column in zip(*rows, strict=True)] or [[], [], [], []]))
    pool = [(identity, tokens) for _, identity, tokens, usable in rows if usable]
    if spec.dedupe == "exact":
        pool = list(dict(reversed(pool)).items())  # the first of each content
    if (spec.budget.count or 0) > len(pool) or (spec.budget.tokens or 0) > sum(tokens for _, tokens in pool):
        with pytest.raises(RequestError, match="to rank"):
            select(*arrays, spec)
        return None
    return select(*arrays, spec)


PROPERTY = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
"""The same cases at every run, and no complaint about a busy machine."""


@PROPERTY
@given(st.lists(row_strategy, max_size=20), selection_strategy())
def test_selection_is_that_of_plain_loops(rows: list[Any], spec: SelectionSpec) -> None:
    found = selected(rows, spec)
    if found is None:
        return

    def nearest(count: int) -> int:
        # A half may be rounded either way: both are nearest.
        assert abs(found.num_taken - (spec.budget.fraction or 0) * count) <= 0.5 + 1e-9
        return found.num_taken

    scores, ids, tokens, usable = [list(column) for column in zip(*rows, strict=True)] or [[], [], [], []]
    order, duplicates, num_taken, threshold = selected_by_hand(scores, ids, tokens, usable, spec, nearest)
    assert found.order.tolist() == order
    assert np.flatnonzero(found.selected_N).tolist() == sorted(order)
    assert set(np.flatnonzero(found.duplicate_N).tolist()) == duplicates
    assert found.num_taken == num_taken
    assert found.threshold == threshold


@pytest.mark.parametrize(("tokens", "taken"), [(4, 0), (5, 1), (11, 1), (12, 2), (13, 2), (14, 3)])
def test_a_token_budget_is_spent_to_the_last_token_and_never_exceeded(tokens: int, taken: int) -> None:
    arrays = as_arrays([3.0, 2.0, 1.0], IDS[:3], [5, 7, 2], [True] * 3)  # the third would still fit: it is not reached
    found = select(*arrays, SelectionSpec(keep="highest", budget=BudgetSpec(tokens=tokens)))
    assert found.order.tolist() == [0, 1, 2][:taken]
    too_much = {"15 response tokens, and there are 14": {"tokens": 15}, "4 examples, and there are 3": {"count": 4}}
    for message, budget in too_much.items():
        with pytest.raises(RequestError, match=f"{message} to rank"):
            select(*arrays, SelectionSpec(keep="highest", budget=BudgetSpec(**budget)))


def contents_repeated(contents: dict[bytes, Any], ids: list[bytes]) -> list[Any]:
    """Rows whose score, tokens and usability belong to their content, as they do in a store."""
    return [(contents[one][0], one, *contents[one][2:]) for one in ids]


content_strategy = st.builds(
    contents_repeated,
    st.fixed_dictionaries(dict.fromkeys(IDS, row_strategy)),
    st.lists(st.sampled_from(IDS), max_size=20),
)


@PROPERTY
@given(content_strategy, selection_strategy(), st.randoms(use_true_random=False))
def test_the_order_of_the_pool_changes_nothing_but_which_of_equal_rows_stands(
    rows: list[Any], spec: SelectionSpec, random: Any
) -> None:
    shuffled = random.sample(rows, len(rows))
    first, second = selected(rows, spec), selected(shuffled, spec)
    assert (first is None) == (second is None)
    if first is None or second is None:
        return
    assert [rows[place][1] for place in first.order] == [shuffled[place][1] for place in second.order]
    assert (first.threshold, first.num_taken) == (second.threshold, second.num_taken)
    assert first.duplicate_N.sum() == second.duplicate_N.sum()
