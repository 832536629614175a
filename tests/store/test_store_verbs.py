"""Laws of `store list|du|prune`, over a folder and over S3: what is kept stays whole, all else goes, and only when asked."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.follow import store_tables as tables
from prism_job.errors import RequestError
from prism_job.publish.needed_keys import find_needed
from prism_job.storage.address import open_store
from prism_job.storage.s3 import MAX_DELETED_AT_ONCE
from prism_job.store.inventory import list_contents, prune
from tests.conftest import STAGES, Job, Row, candidate, pair, write_jsonl

AT_ONCE = ("--older-than", "0")


@pytest.fixture(params=["folder", "s3"])
def stored(request: pytest.FixtureRequest, job: Job) -> Job:
    """A job whose store and output lie in a folder, or on moto's S3."""
    if request.param == "folder":
        return job
    request.getfixturevalue("s3")
    return job.copy(store="s3://prism/gradients", output="s3://prism/selections")


def store_verb(job: Job, action: str, *options: str) -> Row:
    return job.passes("store", action, job.spec["store"], *options)


def run(job: Job) -> str:
    *_, words = [job.passes(stage) for stage in STAGES]
    return str(words["manifest"])


def keys_of(job: Job) -> set[str]:
    return {listed.key for listed in job.store().list()}


def other_selection(job: Job, output: str | None = None) -> Job:
    """The same data under another extractor and name."""
    other = job.copy(
        output=output or job.spec["output"] + "-2",
        extraction=job.spec["extraction"] | {"projection": {"dim": 8, "seed": 7}},
    )
    other.document["metadata"]["name"] = "other"
    return other


def test_prune_removes_everything_that_no_kept_selection_needs(stored: Job) -> None:
    manifest = run(stored)
    needed = keys_of(stored)
    run(other_selection(stored))
    write_jsonl(stored.folder / "pool" / "b.jsonl", [candidate(number) for number in range(50, 57)])
    write_jsonl(stored.folder / "targets.jsonl", [pair(number) for number in range(40, 45)])
    run(stored.copy(output=stored.spec["output"] + "-2"))
    stored.store().put("notes.txt", b"somebody's own")
    assert keys_of(stored) > needed
    held = keys_of(stored)

    listed = store_verb(stored, "prune", "--keep", stored.spec["output"], *AT_ONCE)
    assert keys_of(stored) == held, "a dry run removes nothing"
    assert not listed["removed"]
    done = store_verb(stored, "prune", "--keep", stored.spec["output"], *AT_ONCE, "--yes")
    assert (done["objects"], done["bytes"], done["keys"]) == (listed["objects"], listed["bytes"], listed["keys"])
    assert keys_of(stored) == needed | {"notes.txt"}
    assert set(done["keys"]) == held - needed - {"notes.txt"}
    assert "without --yes" in tables.prune_table(listed)
    assert f"removed: {done['objects']} objects, {done['bytes']:,} bytes" in tables.prune_table(done)

    stored.passes("evaluate", manifest)
    stored.passes("export", manifest, str(stored.folder / "subset.jsonl"))
    (stored.folder / "pool" / "b.jsonl").unlink()
    write_jsonl(stored.folder / "targets.jsonl", [pair(number) for number in range(3)])
    assert stored.plan()["missing"] == 0
    fresh = stored.copy(output=stored.spec["output"] + "-3")
    assert fresh.plan()["missing"] == 0
    assert fresh.stage("reduce")[0] == 0, "what is left is enough to select anew"
    again = store_verb(stored, "prune", "--keep", stored.spec["output"], *AT_ONCE, "--yes")
    assert again["objects"] == 0


def test_every_named_output_is_kept(stored: Job) -> None:
    run(stored)
    run(other_selection(stored))
    held = keys_of(stored)
    keeps = ["--keep", stored.spec["output"], "--keep", stored.spec["output"] + "-2"]
    assert store_verb(stored, "prune", *keeps, *AT_ONCE, "--yes")["objects"] == 0
    assert keys_of(stored) == held


def test_young_objects_are_never_removed(stored: Job) -> None:
    run(stored)
    run(other_selection(stored))
    held = keys_of(stored)
    done = store_verb(stored, "prune", "--keep", stored.spec["output"], "--yes")
    assert keys_of(stored) == held
    assert (done["objects"], done["older_than_hours"]) == (0, 24.0)
    assert done["too_young_objects"] > 0
    # The same store seen a day and an hour later.
    contents, needed = list_contents(stored.spec["store"]), find_needed([stored.spec["output"]])
    later = prune(contents, needed, really=True, now=time.time() + 25 * 3600)
    assert later["objects"] == done["too_young_objects"]
    assert later["bytes"] == done["too_young_bytes"]


def test_age_counts_from_the_put(job: Job) -> None:
    run(job)
    run(other_selection(job))
    doomed = store_verb(job, "prune", "--keep", job.spec["output"], *AT_ONCE)["keys"]
    old = Path(job.spec["store"]) / doomed[0]
    os.utime(old, (1.0, 1.0))
    assert store_verb(job, "prune", "--keep", job.spec["output"], "--yes")["keys"] == [doomed[0]]


def test_a_run_that_has_not_published_yet_loses_nothing(stored: Job) -> None:
    run(stored)
    going_on = other_selection(stored, stored.spec["output"])
    going_on.passes("plan")
    going_on.passes("extract")
    done = store_verb(stored, "prune", "--keep", stored.spec["output"], *AT_ONCE, "--yes")
    assert done["objects"] == 0
    assert done["kept_unfinished"] == [open_store(stored.spec["output"]).uri("other/plan.json")]
    assert "other/plan.json" in tables.prune_table(done)
    going_on.passes("reduce")


def keep_of_nothing(job: Job) -> list[str]:
    return ["--keep", job.spec["output"], "--keep", str(job.folder / "outputt")]


def keep_of_another_store(job: Job) -> list[str]:
    other = other_selection(job, str(job.folder / "elsewhere")).copy(store=str(job.folder / "store2"))
    write_jsonl(job.folder / "pool" / "a.jsonl", [candidate(number) for number in range(60, 70)])
    write_jsonl(job.folder / "targets.jsonl", [pair(number) for number in range(60, 63)])
    run(other)
    return ["--keep", str(job.folder / "elsewhere")]


def keep_with_damaged(pattern: str) -> Callable[[Job], list[str]]:
    def damage(job: Job) -> list[str]:
        next((job.folder / "output").glob(pattern)).write_text("{}")
        return ["--keep", job.spec["output"]]

    return damage


@pytest.mark.parametrize(
    ("keeps", "code", "says"),
    [
        (lambda job: [], 64, "all of the store would be removed"),
        (keep_of_nothing, 64, "no manifest is found there"),
        (keep_of_another_store, 64, "uses this store"),
        (keep_with_damaged("*/*/plan.json"), 65, "checksum mismatch: plan.json"),
        (keep_with_damaged("test/plan.json"), 65, "damaged plan"),
        (keep_with_damaged("*/*/manifest.json"), 65, "damaged manifest"),
    ],
)
def test_a_prune_with_unknown_needs_is_refused(
    job: Job, keeps: Callable[[Job], list[str]], code: int, says: str
) -> None:
    run(job)
    options = keeps(job)
    held = keys_of(job)
    job.refuses(("store", "prune", job.spec["store"], *options, *AT_ONCE, "--yes"), code, says)
    assert keys_of(job) == held


def test_an_empty_store_is_named(job: Job) -> None:
    for action in ("list", "du", "prune"):
        options = ["--keep", job.spec["output"]] if action == "prune" else []
        job.refuses(("store", action, str(job.folder / "nothing"), *options), 64, "nothing")


def test_list_counts_what_the_plans_count(stored: Job) -> None:
    write_jsonl(stored.folder / "targets.jsonl", [pair(number) for number in range(18)])
    run(stored)
    plan = stored.plan()
    run(other_selection(stored))
    listed = {it["extractor"]: it for it in store_verb(stored, "list")["extractors"]}
    assert len(listed) == 2
    for it in listed.values():
        assert (it["units"], it["rows"], it["target_units"], it["pairs"]) == (3, 10, 2, 18)
        assert it["units"] + it["target_units"] == plan["units"]
        assert it["needed_by"] is None
    unjudged = tables.store_table(store_verb(stored, "list")).splitlines()
    assert (len(unjudged), unjudged[1].split()[-1]) == (4, "?")
    assert "--keep" in unjudged[-1]
    kept = store_verb(stored, "list", "--keep", stored.spec["output"])
    assert len(tables.store_table(kept).splitlines()) == 3
    judged = kept["extractors"]
    assert {it["extractor"]: it["needed_by"] for it in judged} == {
        extractor: int(extractor == plan["extractor"]) for extractor in listed
    }


def test_du_counts_every_byte_once(stored: Job) -> None:
    run(stored)
    stored.store().put("notes.txt", b"12345")
    used = store_verb(stored, "du", "--keep", stored.spec["output"])
    sizes = {listed.key: listed.size_bytes for listed in stored.store().list()}
    assert used["bytes"] == sum(sizes.values())
    assert (used["other_objects"], used["other_bytes"]) == (1, 5)
    assert f"{used['bytes']:,} bytes in total" in tables.bytes_table(used)
    assert used["needed_bytes"] == used["bytes"] - 5
    assert sum(it["bytes"] for it in used["extractors"]) == used["bytes"] - 5
    for it in used["extractors"]:
        assert it["bytes"] == sum(it[f"{part}_bytes"] for part in ("candidates", "targets", "factors", "staged"))


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_delete_removes_exactly_these_in_any_number(tmp_path: Path, request: pytest.FixtureRequest, kind: str) -> None:
    if kind == "s3":
        request.getfixturevalue("s3")
    store = open_store("s3://prism/objects" if kind == "s3" else str(tmp_path / "objects"))
    store.put("a/kept", b"1")
    store.put("a/gone", b"2")
    many = [f"b/{number}" for number in range(MAX_DELETED_AT_ONCE + 1)]
    for key in (many[0], many[-1]):  # one in each request
        store.put(key, b"3")
    store.delete(["a/gone", *many])  # most of them were never there, which is no error
    assert [listed.key for listed in store.list()] == ["a/kept"]
    store.delete([])
    if kind == "folder":
        shutil.rmtree(tmp_path / "objects")
        store.delete(["a/kept"])  # nor is a folder that is not there


def test_an_object_that_s3_will_not_delete_is_named(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = open_store("s3://prism/objects")
    answer = {"Errors": [{"Key": "objects/a", "Code": "AccessDenied", "Message": "No."}]}
    monkeypatch.setattr(store, "client", type("Denying", (), {"delete_objects": lambda *_, **__: answer})())
    with pytest.raises(RequestError, match="denies access") as refusal:
        store.delete(["a", "b"])
    assert refusal.value.where == "s3://prism/objects/a"
    assert "s3:DeleteObject" in refusal.value.fix
