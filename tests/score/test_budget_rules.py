"""Laws of `perSource`, `perGroup` and `dedupe: near`, against plain loops over all pairs and all subsets."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_job.data.labels import group_of
from prism_job.errors import RequestError
from prism_job.score import walk as walks
from prism_job.score.column import Column
from prism_job.score.groups import Groups
from prism_job.score.selection import Selected, select
from prism_job.score.walk import sign_bytes
from prism_job.spec.ranking import SelectionSpec
from tests.conftest import Job, candidate, read_json, table_of, write_jsonl
from tests.score.test_selection import PROPERTY as MANY
from tests.score.test_selection import as_arrays

PROPERTY = settings(MANY, max_examples=120)

NUM_BITS = 64


def selection(document: dict[str, Any]) -> SelectionSpec:
    return SelectionSpec.model_validate(document)


def column(values: Any, dtype: str) -> Column:
    made = Column(dtype)
    made.append(np.asarray(values))
    return made


def chosen(
    scores: list[float], spec: SelectionSpec, groups: list[int], signs: list[int], tokens: list[int] | None = None
) -> Selected:
    """Rows of 64 signs, each with an id of its own that rises with its place."""
    ids = [bytes(8) + place.to_bytes(8, "big") for place in range(len(scores))]
    arrays = as_arrays(scores, ids, tokens or [1] * len(scores), [True] * len(scores))
    shares = spec.shares and Groups(
        spec.shares, "spec.selection.perSource", list(map(str, range(4))), column(groups, "u4")
    )
    words = column(np.array(signs, np.uint64).view("V8"), "V8") if spec.dedupe == "near" else None
    return select(*arrays, spec, shares or None, words)


def taken_by_hand(
    ranked: list[int], weight: list[int], group: list[int], signs: list[int] | None, spec: SelectionSpec, budget: int
) -> tuple[list[int], dict[int, int]]:
    """(rows taken, best first; near-duplicates and what they repeat), by plain loops over all pairs."""
    in_tokens, shares = spec.budget.tokens is not None, spec.shares
    most = Fraction(repr(shares.max)) * budget if shares and shares.max else budget
    cap = math.floor(most) if in_tokens else math.ceil(most)
    least = math.floor(Fraction(repr(shares.min)) * budget) if shares and shares.min else 0
    reserve = {one: min(least, sum(weight[row] for row in ranked if group[row] == one)) for one in set(group)}
    while True:
        left = dict(reserve)
        room, is_open = budget - sum(reserve.values()), True
        taken: list[int] = []
        repeats: dict[int, int] = {}
        used, closed = dict.fromkeys(reserve, 0), set()
        for row in ranked:
            one = group[row]
            if one in closed or (not left[one] and (not is_open or room == 0)):
                continue
            near = [other for other in taken if signs and bits_shared(signs, row, other) >= (spec.near_agreement or 2)]
            if near:
                repeats[row] = near[0]
                continue
            if used[one] + weight[row] > cap:
                closed.add(one)
            if left[one] and weight[row] > left[one]:
                room, left[one] = room + left[one], 0
            if one in closed:
                continue
            if left[one]:
                left[one] -= weight[row]
            elif weight[row] <= room and is_open:
                room -= weight[row]
                is_open = room > 0
            else:
                is_open = False
                continue
            used[one] += weight[row]
            taken.append(row)
        short = [one for one in reserve if left[one]]
        if not short:
            return taken, repeats
        reserve |= {one: used[one] for one in short}


def bits_shared(signs: list[int], row: int, other: int) -> float:
    return 1 - (signs[row] ^ signs[other]).bit_count() / NUM_BITS


def flipped(base: int, bits: list[int]) -> int:
    for bit in bits:
        base ^= 1 << bit
    return base


sign_strategy = st.builds(
    flipped,
    st.sampled_from([0, 2**64 - 1, 0x0F0F0F0F0F0F0F0F]),
    st.lists(st.integers(0, 63), max_size=8, unique=True),
)
row_strategy = st.tuples(
    st.sampled_from([-2.0, -1.0, 0.0, 1.0, 3.0]), st.integers(0, 3), st.sampled_from([1, 2, 3, 10]), sign_strategy
)
share_strategy = st.sampled_from([None, {"max": 0.34}, {"max": 0.5}, {"min": 0.25}, {"min": 0.2, "max": 0.6}])
budget_strategy = st.sampled_from(
    [{"count": 1}, {"count": 4}, {"fraction": 0.4}, {"fraction": 1}, {"tokens": 9}, {"tokens": 25}]
)
near_strategy = st.sampled_from([{}, {"dedupe": "near"}, {"dedupe": "near", "nearAgreement": 0.95}])


@PROPERTY
@given(
    st.lists(row_strategy, min_size=1, max_size=20),
    share_strategy,
    budget_strategy,
    near_strategy,
    st.sampled_from(["highest", "lowest"]),
)
def test_rules_take_what_plain_loops_take(
    rows: list[Any], shares: dict[str, float] | None, budget: dict[str, Any], near: dict[str, Any], end: str
) -> None:
    scores, group, tokens, signs = [list(values) for values in zip(*rows, strict=True)]
    spec = selection({"keep": end, "budget": budget, **near, **({"perSource": shares} if shares else {})})
    sign = -1 if end == "highest" else 1
    ranked = sorted(range(len(rows)), key=lambda row: (sign * scores[row], row))
    weight = tokens if "tokens" in budget else [1] * len(rows)
    amount = budget.get("tokens") or budget.get("count") or round(budget["fraction"] * len(rows))
    expected, repeats = taken_by_hand(
        ranked, weight, group if shares else [0] * len(rows), signs if near else None, spec, amount
    )
    try:
        found = chosen(scores, spec, group, signs, tokens)
    except RequestError:
        assert sum(weight[row] for row in expected) < amount
        return
    assert sorted(np.flatnonzero(found.selected_N).tolist()) == sorted(expected)
    assert found.num_taken == len(expected)
    assert found.threshold == (scores[expected[-1]] if expected else None)
    if near:
        assert found.near is not None
        assert dict(zip(*(part.tolist() for part in found.near), strict=True)) == repeats
        assert set(np.flatnonzero(found.duplicate_N).tolist()) == set(repeats)


@PROPERTY
@given(
    st.lists(st.tuples(st.integers(-8, 8), st.integers(0, 2)), min_size=4, max_size=9),
    st.sampled_from([{"max": 0.5}, {"max": 0.34, "min": 0.3}, {"min": 0.2}]),
    st.integers(1, 4),
)
def test_of_all_sets_within_the_shares_the_one_with_the_highest_scores_is_taken(
    rows: list[Any], shares: dict[str, float], count: int
) -> None:
    scores, group = [list(values) for values in zip(*rows, strict=True)]
    cap = math.ceil(Fraction(repr(shares.get("max", 1.0))) * count)
    least = math.floor(Fraction(repr(shares.get("min", 0.0))) * count)
    size = {one: group.count(one) for one in set(group)}
    sums = [
        sum(scores[row] for row in rows_of)
        for rows_of in itertools.combinations(range(len(rows)), count)
        if all(min(least, size[one]) <= sum(group[row] == one for row in rows_of) <= cap for one in size)
    ]
    spec = selection({"keep": "highest", "budget": {"count": count}, "perSource": shares})
    if not sums:
        with pytest.raises(RequestError, match="leaves room"):
            chosen(list(map(float, scores)), spec, group, [])
        return
    found = chosen(list(map(float, scores)), spec, group, [])
    assert sum(scores[row] for row in found.order) == max(sums)


def test_a_budget_that_cannot_be_filled_is_refused() -> None:
    scores, group = [4.0, 3.0, 2.0, 1.0], [0, 0, 0, 1]
    spec = selection({"keep": "highest", "budget": {"count": 4}, "perSource": {"max": 0.5}})
    with pytest.raises(RequestError, match=r"max 0\.5 leaves room for 3 of the budget's 4 examples") as refused:
        chosen(scores, spec, group, [])
    assert refused.value.where == "spec.selection.perSource.max"
    copies = selection({"keep": "highest", "budget": {"count": 3}, "dedupe": "near"})
    with pytest.raises(RequestError, match="the budget is 3 examples, and 2 are left without near-duplicates"):
        chosen(scores, copies, group, [0, 0, 2**64 - 1, 0])
    fraction = selection({"keep": "highest", "budget": {"fraction": 0.75}, "dedupe": "near"})
    assert chosen(scores, fraction, group, [0, 0, 2**64 - 1, 0]).order.tolist() == [0, 2]  # all that is left


def test_a_budget_that_drops_leaves_no_near_duplicates_in_the_rest() -> None:
    """Of those that stay, the one farther from the dropped end; a copy of a dropped row stays."""
    scores, signs = [5.0, 4.0, 3.0, 2.0, 1.0], [0, 1, 2**64 - 1, 0, 2**64 - 1]
    for drop, kept, repeats in (("lowest", [0, 2], {1: 0, 3: 0}), ("highest", [4, 3], {1: 3, 2: 4})):
        spec = selection({"drop": drop, "budget": {"count": 1}, "dedupe": "near"})
        found = chosen(scores, spec, [0] * 5, signs)
        assert sorted(found.order.tolist()) == sorted(kept)
        assert found.near is not None
        assert dict(zip(*(part.tolist() for part in found.near), strict=True)) == repeats
        assert found.num_taken == 1


@pytest.mark.parametrize("part_rows", [7, 2**14])
def test_tables_find_the_near_duplicates_that_all_pairs_find(part_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 4,096 signs: unrelated ones agree in .5 ± .008, and the copies here in at least .93, so that the tables, which
    find a pair at .9 with probability .99, miss one at .93 with 1e-4 each. A fixed seed."""
    random = np.random.default_rng(0)
    rows_NW = random.integers(0, 256, (3000, walks.SIGN_BYTES), np.uint8)
    for copy, origin in enumerate(random.integers(0, 1500, 1000).tolist(), 1500):
        rows_NW[copy] = rows_NW[origin]
        bits = random.integers(0, 4096, random.integers(0, 280))
        np.bitwise_xor.at(rows_NW[copy], bits // 8, np.uint8(1) << (bits % 8).astype(np.uint8))
    order = random.permutation(3000)
    signs = column(sign_bytes({"signs": rows_NW[order]}), f"V{walks.SIGN_BYTES}")
    ids = [place.to_bytes(16, "big") for place in range(3000)]
    arrays = as_arrays(random.random(3000).tolist(), ids, [1] * 3000, [True] * 3000)
    spec = selection({"keep": "highest", "budget": {"fraction": 0.8}, "dedupe": "near"})
    all_pairs = select(*arrays, spec, None, signs)
    monkeypatch.setattr(walks, "ALL_PAIRS", 0)
    monkeypatch.setattr("prism_job.score.column.PART_ROWS", part_rows)
    tables = select(*arrays, spec, None, signs)
    assert all_pairs.near is not None
    assert tables.near is not None
    assert len(all_pairs.near[0]) > 500
    for one, other in zip(all_pairs.near, tables.near, strict=True):
        assert one.tolist() == other.tolist()
    assert all_pairs.order.tolist() == tables.order.tolist()


@pytest.mark.parametrize("agreement", [0.8, 0.85, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("num_rows", [5_000, 50_000, 1_000_000, 10_000_000])
def test_tables_find_a_pair_at_the_threshold_with_the_stated_probability(num_rows: int, agreement: float) -> None:
    bits, tables = walks.table_sizes(8 * walks.SIGN_BYTES, agreement, num_rows)
    assert bits * tables <= 8 * walks.SIGN_BYTES
    assert 1 - (1 - agreement**bits) ** tables >= walks.FOUND


def test_a_selection_without_these_settings_keeps_its_id() -> None:
    spec = selection({"keep": "highest", "budget": {"count": 4}})
    budget = {"count": 4, "fraction": None, "tokens": None}
    assert spec.settings() == {"keep": "highest", "drop": None, "budget": budget, "dedupe": "exact"}
    near = selection({"keep": "highest", "budget": {"count": 4}, "dedupe": "near"})
    assert near.settings()["near_agreement"] == near.near_agreement is not None


def test_a_group_below_its_min_gives_all_it_has_and_the_manifest_states_it() -> None:
    spec = selection({"keep": "highest", "budget": {"count": 4}, "perSource": {"min": 0.5}})
    found = chosen([5.0, 4.0, 3.0, 2.0, 1.0], spec, [0, 0, 0, 0, 1], [])
    assert found.order.tolist() == [0, 1, 2, 4]
    assert found.rules == {
        "unit": "examples",
        "entered": 1,
        "left": 1,
        "groups": [
            {"group": "0", "pool": 4, "without": 4, "with": 3, "entered": 0, "left": 1, "below_min": False},
            {"group": "1", "pool": 1, "without": 0, "with": 1, "entered": 1, "left": 0, "below_min": True},
        ],
    }


# Through the stages


def grouped_pool(job: Job) -> None:
    """Two sources; `task` has the values 0, "a" and none; every third row of b repeats one of a but for the white space."""
    first = [{**candidate(number), "task": [0, "a", None][number % 3]} for number in range(12)]
    second = [{**candidate(number), "task": "a"} for number in range(20, 28)]
    write_jsonl(job.folder / "pool" / "a.jsonl", first)
    write_jsonl(job.folder / "pool" / "b.jsonl", second)


def test_a_group_with_half_a_surrogate_pair_has_a_name_that_a_manifest_can_hold() -> None:
    assert group_of({"task": "a \ud800"}, "task", "here") == "a \\ud800"


def test_what_the_rules_moved_is_in_manifest_tables_and_report(job: Job) -> None:
    grouped_pool(job)
    job.spec["selection"] = {"keep": "highest", "budget": {"count": 6}}
    plain = {row["example_id"] for row in table_of(job.run(), "selected")}
    for rule, groups in (("perSource", ["a.jsonl", "b.jsonl"]), ("perGroup", ["a", "0", None])):
        shares = {"max": 0.5} if rule == "perSource" else {"groupBy": "task", "max": 0.34}
        job.spec["selection"][rule] = shares
        manifest = job.run()
        selected = {row["example_id"] for row in table_of(manifest, "selected")}
        rules = read_json(manifest)["rules"]
        assert rules["unit"] == "examples"
        assert (rules["entered"], rules["left"]) == (len(selected - plain), len(plain - selected))
        names = [one["group"] and one["group"].rpartition("/")[2] for one in rules["groups"]]
        assert sorted(names, key=str) == sorted(groups, key=str)
        assert sum(one["with"] for one in rules["groups"]) == sum(one["without"] for one in rules["groups"]) == 6
        assert all(one["with"] <= 3 for one in rules["groups"])
        assert sum(one["pool"] for one in rules["groups"]) == 20
        assert "What the rules changed" in (manifest.parent / "report.html").read_text()
        figures = job.passes("evaluate", str(manifest), "--label", "label")
        labels = {row["example_id"]: row["line"] % 2 == 0 for row in table_of(manifest, "scores")}
        assert figures["precision_within_shares"] == sum(labels[one] for one in selected) / 6
        del job.spec["selection"][rule]


@pytest.mark.parametrize("kind", ["sign", "float16"])
def test_each_near_duplicate_names_the_row_that_it_repeats(job: Job, kind: str) -> None:
    rows = [candidate(number) for number in range(8)]
    # The tiny model reads these as one token more in the prompt; all rows of this pool are closer than .5.
    write_jsonl(job.folder / "pool" / "a.jsonl", [*rows, rows[0]])
    job.use_codec(kind)
    job.spec["selection"] = {"keep": "highest", "budget": {"fraction": 1}, "dedupe": "near", "nearAgreement": 0.85}
    manifest = job.run()
    scores = table_of(manifest, "scores")
    rules = read_json(manifest)["rules"]
    assert scores[8]["duplicate"]
    assert scores[8]["duplicate_of"] == scores[0]["example_id"]
    by_id = {row["example_id"]: row for row in scores[:8]}
    repeats = [row for row in scores[:8] if row["duplicate"]]
    assert rules["near_duplicates"]["left_out"] == len(repeats)
    assert {row["example_id"] for row in scores[:8] if row["duplicate_of"]} == {row["example_id"] for row in repeats}
    for row in repeats:
        other = by_id[row["duplicate_of"]]
        assert other["selected"]
        assert other["score"] >= row["score"]
    assert [row["selected"] for row in scores[:8]] == [not row["duplicate"] for row in scores[:8]]
    assert read_json(manifest)["spec"]["spec"]["selection"]["nearAgreement"] == 0.85
    job.passes("evaluate", str(manifest), "--label", "label")


REFUSED = {
    "no such column": ({"groupBy": "topic", "max": 0.5}, "no candidate has a value in 'topic'", "'task'"),
    "more than 1 in all": ({"groupBy": "task", "min": 0.4}, "3 groups of at least 0.4", "0.3333"),
    "less than 1 in all": ({"groupBy": "task", "max": 0.3}, "3 groups of at most 0.3", "0.3333"),
    "a list": ({"groupBy": "messages", "max": 0.5}, "which is no group", "a.jsonl line 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_groups_that_cannot_share_a_budget_are_refused_before_the_extraction(job: Job, case: str) -> None:
    grouped_pool(job)
    shares, *mentions = REFUSED[case]
    job.spec["selection"]["perGroup"] = shares
    job.refuses("plan", 64, *mentions)


def test_too_many_groups_are_refused(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prism_job.plan.checks.MAX_GROUPS", 2)
    grouped_pool(job)
    job.spec["selection"]["perGroup"] = {"groupBy": "task", "max": 0.5}
    job.refuses("plan", 64, "more than 2 values", "perGroup.groupBy")
