"""Names and labels of rendered objects: valid, within their limits, and never shared."""

from __future__ import annotations

from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from launcher.render.attempt import Attempt
from launcher.render.job import job as job_of
from launcher.render.service import services
from launcher.render.shared_objects import shared_objects
from launcher.resource.names import LONGEST_JOB_NAME, LONGEST_NAME, job_name
from launcher.resource.record import config_map_record
from tests.render.documents import (
    DNS_1035,
    DNS_LABEL,
    LABEL_VALUE,
    OWNER,
    every_document,
    named,
    objects_of,
    run_of,
    template,
)


def test_names_stay_within_their_limits_at_the_largest_numbers() -> None:
    # What the document allows at most; an attempt also counts suspensions, which nothing bounds.
    for groups, nodes in ((256, 4), (4, 256), (32, 32)):
        run = run_of("9" + "n" * (LONGEST_NAME - 1), groups=groups, nodesPerGroup=nodes)
        for stage, group in (("plan", 0), ("extract", groups - 1), ("reduce", 0)):
            attempt = Attempt(run, stage, group, 1_000_000, 99_999, "team", OWNER)
            job = job_of(attempt)
            name, last = named(job), job["spec"]["completions"] - 1
            assert DNS_LABEL.fullmatch(name)
            assert len(f"{name}-{last}") <= 63  # the host name of the last pod
            for service in services(attempt):
                assert DNS_1035.fullmatch(named(service))
                assert len(named(service)) <= 63
                assert len(f"{name}-0.{named(service)}.team.svc") <= 253
            for labels in (job["metadata"]["labels"], template(job)["metadata"]["labels"]):
                assert all(len(value) <= 63 and LABEL_VALUE.fullmatch(value) for value in labels.values())


STAGES = st.sampled_from(["plan", "extract", "reduce"])
ATTEMPTS = st.tuples(STAGES, st.integers(0, 255), st.integers(0, 1_000_000), st.integers(0, 99_999))


@given(st.lists(ATTEMPTS, min_size=2, max_size=20, unique=True))
def test_each_attempt_has_its_own_job_name(places: list[tuple[Any, int, int, int]]) -> None:
    places = list({(stage, group if stage == "extract" else 0, *rest): None for stage, group, *rest in places})  # type: ignore[misc]
    for run in ("demo", "n" * LONGEST_NAME):
        names = [job_name(run, *place) for place in places]
        assert len(set(names)) == len(names)
        assert all(len(name) <= LONGEST_JOB_NAME and DNS_LABEL.fullmatch(name) for name in names)


PARTS = ["a", "b", "extract", "plan", "reduce", "prism", "document", "record", "0", "1", "00"]
RUNS = st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map("-".join).filter(lambda it: len(it) <= LONGEST_NAME)


ROUNDS, NUMBERS = st.sampled_from([0, 1, 10, 1_000_000]), st.sampled_from([0, 1, 10, 99_999])


@given(st.lists(st.tuples(RUNS, STAGES, st.integers(0, 2), ROUNDS, NUMBERS), min_size=2, max_size=30))
@settings(max_examples=40)
@example([("x", "extract", 0, 0, 0), ("x-extract-0", "plan", 0, 0, 0), ("x-extract", "extract", 0, 0, 0)])
@example([("a", "extract", 0, 0, 0), ("a-0", "extract", 0, 0, 0), ("a-0-0", "plan", 0, 0, 0)])
def test_no_two_runs_of_a_namespace_share_the_name_of_an_object(places: list[tuple[Any, ...]]) -> None:
    wanted = {(run, stage, group if stage == "extract" else 0, *rest) for run, stage, group, *rest in places}
    owners: dict[tuple[str, str], tuple[Any, ...]] = {}
    for run_name, stage, group, round_number, attempt in wanted:
        run = run_of(run_name, groups=3, nodesPerGroup=2)
        whole = Attempt(run, stage, group, round_number, attempt, "team", OWNER)
        job = job_of(whole)
        assert owners.setdefault(("Job", named(job)), (run_name, stage, group, round_number, attempt))[0] == run_name
        around = [*shared_objects(run, "team", OWNER), *services(whole)]
        for one in (config_map_record(run, "", "team"), *around):
            assert owners.setdefault((one["kind"], named(one)), (run_name,))[0] == run_name
    assert sum(kind == "Job" for kind, _ in owners) == len(wanted)


def test_usual_names_are_readable() -> None:
    assert job_name("curate-math", "extract", 2, 0, 1) == "curate-math-extract-2-0-1"
    assert job_name("curate-math", "plan", 0, 3, 0) == "curate-math-plan-3-0"


@every_document
def test_labels_are_valid(document: str) -> None:
    for one in objects_of(document):
        assert all(LABEL_VALUE.fullmatch(value) for value in one["metadata"]["labels"].values())
        assert DNS_LABEL.fullmatch(named(one))
