"""The cache: nothing older replaces what is newer, and each object belongs to one run."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.operator.cache import Cache
from launcher.resource.names import RECORD_LABEL, RUN_LABEL
from launcher.resource.record import Record

Object = dict[str, Any]


def thing(
    kind: str, name: str, version: int, *, uid: str = "", run: str = "demo", owner: str = "r", **labels: str
) -> Object:
    metadata = {"name": name, "namespace": "team", "uid": uid or name, "resourceVersion": str(version)}
    metadata |= {"labels": {**({RUN_LABEL: run} if run else {}), **labels}, "ownerReferences": [{"uid": owner}]}
    return {"kind": kind, "metadata": metadata}


def a_record_in(cache: Cache, version: int = 1) -> Record:
    cache.put(thing("SelectionRun", "demo", version, uid="r"))
    record = cache.record("SelectionRun", ("team", "demo"))
    assert record is not None
    return record


def test_what_we_wrote_is_not_overtaken_by_an_older_event_or_listing() -> None:
    cache = Cache()
    record = a_record_in(cache)
    cache.put(thing("Job", "a", 7))
    cache.put(thing("Job", "a", 5))
    assert cache.observed(record).jobs["a"]["metadata"]["resourceVersion"] == "7"
    assert cache.replace("Job", [], "6") == set()
    assert list(cache.observed(record).jobs) == ["a"]
    assert cache.replace("Job", [], "7") == {("team", "demo")}
    assert cache.observed(record).jobs == {}


def test_a_removal_takes_only_the_object_that_it_names() -> None:
    cache = Cache()
    record = a_record_in(cache)
    cache.put(thing("Job", "a", 5, uid="new"))
    assert cache.drop(thing("Job", "a", 4, uid="old")) == ("team", "demo")
    assert list(cache.observed(record).jobs) == ["a"]
    cache.drop(thing("Job", "a", 6, uid="new"))
    assert cache.observed(record).jobs == {}


def test_a_late_answer_does_not_restore_a_removed_object() -> None:
    cache = Cache()
    record = a_record_in(cache)
    cache.drop(thing("Job", "a", 6, uid="old"))
    cache.put(thing("Job", "a", 5, uid="old"))
    assert cache.observed(record).jobs == {}
    cache.put(thing("Job", "a", 8, uid="new"))
    assert list(cache.observed(record).jobs) == ["a"]
    cache.drop(thing("SelectionRun", "demo", 9, uid="r"))
    cache.put(thing("SelectionRun", "demo", 8, uid="r"))
    assert cache.record("SelectionRun", ("team", "demo")) is None


def test_a_removed_record_is_forgotten_after_a_new_listing_too() -> None:
    cache = Cache()
    a_record_in(cache, 3)
    cache.replace("SelectionRun", [], "5")
    cache.put(thing("SelectionRun", "demo", 4, uid="r"))
    assert cache.records("SelectionRun") == []


@pytest.mark.parametrize("run", ["", "other"])
def test_a_child_whose_label_is_changed_leaves_its_run(run: str) -> None:
    cache = Cache()
    record = a_record_in(cache)
    cache.put(thing("Job", "a", 5))
    changed = thing("Job", "a", 6, run=run)
    assert cache.put(changed) is not None
    assert cache.observed(record).jobs == {}
    cache.drop({**changed, "metadata": {**changed["metadata"], "resourceVersion": "7"}})
    assert cache.observed(record).jobs == {}


def test_a_child_that_leaves_a_watch_by_its_label_is_dropped() -> None:
    cache = Cache()
    record = a_record_in(cache)
    cache.put(thing("Job", "a", 5))
    assert cache.drop(thing("Job", "a", 6, run="")) == ("team", "demo")
    assert cache.observed(record).jobs == {}


def test_records_are_of_both_kinds_and_a_document_is_none() -> None:
    cache = Cache()
    a_record_in(cache)
    cache.put(thing("ConfigMap", "demo-document", 2))
    assert cache.record("ConfigMap", ("team", "demo")) is None
    cache.put(thing("ConfigMap", "demo-prism-record", 3, **{RECORD_LABEL: "true"}))
    found = cache.record("ConfigMap", ("team", "demo"))
    assert found is not None
    assert found.metadata["name"] == "demo-prism-record"
    assert len(cache.records("SelectionRun")) == len(cache.records("ConfigMap")) == 1


def test_an_object_of_no_run_and_one_of_another_owner_do_not_count() -> None:
    cache = Cache()
    record = a_record_in(cache)
    assert cache.put(thing("Job", "a", 1, run="")) is None
    assert cache.drop(thing("Job", "a", 1, run="")) is None
    cache.put(thing("Job", "a", 5, owner="an earlier record"))
    assert cache.observed(record).jobs == {}
