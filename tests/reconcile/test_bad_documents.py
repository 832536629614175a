"""Documents and statuses that make no sense."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.reconcile.actions import Decision, Observed
from launcher.reconcile.decide import UnknownStatus, decide
from launcher.resource.names import RECORD_LABEL, RUN_LABEL
from launcher.resource.record import Record
from launcher.resource.status import TERMINAL, time_text
from tests.reconcile.world import (
    PHASES,
    START,
    TIMEOUTS,
    Object,
    World,
    a_record,
    cancelled,
    check_pass,
    complete,
    creates,
    extracting,
    planning,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=15,
)
FIELDS = [
    "retry",
    "suspend",
    "ttlSecondsAfterFinished",
    "store",
    "output",
    "model",
    "candidates",
    "selection",
    "cluster",
]


def decided(record: Object, seen: Observed | None = None) -> Decision:
    decision = decide(Record(record), seen or Observed({}), START, TIMEOUTS)
    check_pass(Record(record), Record(record).status, decision)
    return decision


def is_refused(record: Object) -> bool:
    decision = decided(record)
    if decision.status.holds("Accepted"):
        return False
    again = decided(record | {"status": decision.status.to_document()})
    assert again.status == decision.status, "said once"
    assert (decision.status.phase, decision.actions) == ("Failed", ())
    assert decision.status.condition("Accepted").reason == "InvalidSpec"
    return True


@given(JSON)
@settings(max_examples=60, deadline=None)
def test_every_wrong_document_is_refused_without_a_crash(spec: Any) -> None:
    assert is_refused(a_record(spec=spec) | {"spec": spec})


@given(st.sampled_from(FIELDS), JSON)
@settings(max_examples=100, deadline=None)
def test_a_document_with_one_field_wrong_is_refused_or_run(field: str, value: Any) -> None:
    record = a_record()
    record["spec"][field] = value
    is_refused(record)


@given(st.sampled_from(["podOverlay", "env", "image", "queueName", "groups", "cpu"]), JSON)
@settings(max_examples=100, deadline=None)
def test_a_cluster_section_with_one_field_wrong_is_refused_or_run(field: str, value: Any) -> None:
    is_refused(a_record(**{field: value}))


@pytest.mark.parametrize("character", ["😀", "\ud83d", "\x7f", "\u2028", "\x00"])
def test_any_character_of_a_document_is_taken_as_it_is_or_refused(character: str) -> None:
    record = a_record()
    record["spec"]["store"] = f"s3://bucket/{character}"
    refused = is_refused(record)
    assert refused == (character == "\ud83d")


@pytest.mark.parametrize("length", [41, 63, 253])
def test_a_name_that_is_too_long_is_refused_in_words(length: int) -> None:
    record = a_record("n" * length)
    assert is_refused(record)
    assert "metadata.name" in decided(record).status.message


@pytest.mark.parametrize("begin", [World, planning, complete, cancelled])
def test_a_refused_document_fails_its_round_and_a_corrected_one_runs(begin: Callable[..., World]) -> None:
    world = begin()
    world.change(retry=1, store="ftp://x")
    world.settle()
    # `prism wait` waits for an end of the round that is asked for.
    assert (world.status.phase, world.status.round, world.status.holds("Accepted")) == ("Failed", 1, False)
    assert world.status.completion_time == time_text(world.now)
    world.change(store="s3://bucket/store")
    world.settle()
    assert (world.status.phase, world.status.round) == ("Planning", 1)
    assert world.unfinished() == ["demo-plan-1-0"]


def test_a_literal_secret_is_refused_and_repeated_nowhere() -> None:
    record = a_record(env=[{"name": "AWS_SECRET_ACCESS_KEY", "value": "wJalrXUtnFEMI"}])
    assert is_refused(record)
    assert "wJalr" not in json.dumps(decided(record).status.to_document())


@pytest.mark.parametrize("begin", PHASES.values(), ids=PHASES)
def test_a_document_that_becomes_invalid_stops_the_run_and_changes_no_terminal_phase(
    begin: Callable[..., World],
) -> None:
    world = begin().settle()
    phase = world.status.phase
    world.change(store=7)
    world.settle()
    assert world.status.phase == (phase if phase in TERMINAL else "Failed")
    assert world.unfinished() == []


def config_map(text: str, status: str | None = None) -> Object:
    labels = {RUN_LABEL: "demo", RECORD_LABEL: "true"}
    metadata = {"name": "demo-prism-record", "namespace": "team", "uid": "record-1", "labels": labels}
    data = {"selection.yaml": text} | ({} if status is None else {"status": status})
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


DOCUMENT = json.dumps(a_record() | {"metadata": {"name": "demo"}})


def test_a_config_map_stands_for_a_record() -> None:
    decision = decided(config_map(DOCUMENT))
    assert creates(decision) == ["demo-plan-0-0"]
    owner = decision.actions[-1].object["metadata"]["ownerReferences"][0]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("ConfigMap", "demo-prism-record", "record-1")


@pytest.mark.parametrize(
    "text",
    [
        *("", "\t", "a: [", "- 1", "spec: 2024-99-99", "spec: {store: 2024-01-01}", "spec: &a {x: *a}", "[" * 1500),
        *("? [1]\n: 2", "spec: {cluster: &a {podOverlay: *a}}", "spec: {retry: .inf}"),
        *("spec: !!python/object:os.system {}", DOCUMENT.replace('"demo"', '"other"')),
    ],
)
def test_a_config_map_with_nonsense_is_refused(text: str) -> None:
    decision = decided(config_map(text))
    assert (decision.status.phase, decision.status.holds("Accepted"), decision.actions) == ("Failed", False, ())


@given(st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_text_in_a_config_map_is_refused(text: str) -> None:
    assert not decided(config_map(text)).status.holds("Accepted")


def test_an_overlay_that_holds_itself_is_refused() -> None:
    text = f'{DOCUMENT[:-3]}, "podOverlay": &a {{x: *a}}}}}}}}'
    decision = decided(config_map(text))
    assert not decision.status.holds("Accepted")


@pytest.mark.parametrize(
    "status",
    [
        {"phase": "Complete", "completionTime": "yesterday"},
        {"phase": 3},
        {"stages": [{"stage": "plan", "notBefore": "soon"}]},
        {"startTime": "2026-05-01T12:00:00"},
        [],
        "x",
        {"stages": [{"stage": "plan", "attempt": "many"}]},
        {"conditions": [{"type": "Complete"}]},
    ],
)
def test_a_status_that_cannot_be_read_is_not_overwritten(status: Any) -> None:
    retried, going, refused = a_record(), a_record(), a_record(spec={"store": 7})
    retried["spec"]["retry"] = 3
    going["metadata"]["deletionTimestamp"] = time_text(START)
    stored = [it | {"status": status} for it in (a_record(), retried, going, refused)]
    for found in (*stored, config_map(DOCUMENT, json.dumps(status))):
        with pytest.raises(UnknownStatus, match=r"Unknown \(status.* cannot be read: "):
            decide(Record(found), Observed({}), START, TIMEOUTS)
        shown = Record(found).status
        assert (shown.phase, shown.is_terminal) == ("Unknown", False)
        assert "cannot be read" in shown.message


@pytest.mark.parametrize("status", [None, {}])
def test_a_status_of_nothing_is_a_fresh_one(status: Any) -> None:
    assert decided(a_record() | {"status": status}).status.phase == "Planning"
    assert decided(config_map(DOCUMENT, json.dumps(status or {}))).status.phase == "Planning"
    assert decided(config_map(DOCUMENT, "")).status.phase == "Planning"


LATER: list[Object] = [
    {"phase": "Sleeping"},
    {"phase": "Extracting", "stages": [{"stage": "plan", "state": "Skipped"}]},
    {"phase": "Extracting", "stages": [{"stage": "index"}]},
]


@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("begin", [planning, extracting])
def test_a_run_of_a_later_version_is_left_alone_until_a_new_round(later: Object, begin: Callable[..., World]) -> None:
    world = begin()
    assert world.record is not None
    world.record["status"] |= later
    for change in ({}, {"suspend": True}, {"store": 7}):
        world.change(**change)
        with pytest.raises(UnknownStatus, match=r"values that this version does not know: (Sleeping|Skipped|index)"):
            world.decide()
    world.change(retry=1, suspend=False, store="s3://bucket/store")
    world.settle()
    assert (world.status.phase, world.status.round) == ("Planning", 1)
    assert world.unfinished() == ["demo-plan-1-0"]


def test_a_terminal_phase_that_a_later_version_wrote_is_terminal() -> None:
    world = complete()
    assert world.record is not None
    world.record["status"] |= {"driver": "scheduler"}
    world.record["status"]["stages"][1]["state"] = "Skipped"
    checked = {"type": "Checked", "status": "Maybe", "reason": "x", "observedGeneration": 1}
    world.record["status"]["conditions"].append({**checked, "lastTransitionTime": time_text(START)})
    assert world.decide().actions == ()
    assert world.decide().status == world.status
    assert world.status.phase == "Complete"


def test_a_status_of_a_later_version_is_read_as_far_as_we_know_it() -> None:
    world = complete()
    assert world.record is not None
    world.record["status"] |= {"colour": "green"}
    assert world.status.phase == "Complete"
    assert world.decide().actions == ()
