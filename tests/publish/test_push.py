"""Exports that go to the Hugging Face hub: the real client against a local stand-in of the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from prism_job.errors import TransientError
from prism_job.publish.export import hub as hub_push
from tests.conftest import Job, table_of
from tests.data import hub_server
from tests.publish.push_server import READ_TOKEN, TOKEN, DataSet, Hub, push_server

ADDRESS = "hf://datasets/team/subset"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub to which the token in the environment may write."""
    from huggingface_hub import constants

    with push_server() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


def test_a_push_is_one_commit_of_data_card_and_croissant_to_a_private_data_set(job: Job, hub: Hub) -> None:
    manifest = str(job.run())
    message = job.passes("export", manifest, ADDRESS)
    assert (message["written"], message["rows"], message["unchanged"]) == (f"{ADDRESS}/train.jsonl", 4, False)
    there = hub.datasets["team/subset"]
    assert there.visibility == "private"
    assert there.commits == ["initial commit", f"test: selection {Path(manifest).parent.name}"]
    local = job.folder / "train.jsonl"
    job.passes("export", manifest, str(local))
    assert there.files["train.jsonl"] == local.read_bytes()
    card = yaml.safe_load(there.files["README.md"].decode().split("---")[1])
    assert card["configs"][0]["data_files"] == [{"split": "train", "path": "train.jsonl"}]
    document = json.loads(there.files["croissant.json"])
    assert document["url"] == message["page"] == f"{hub.endpoint}/datasets/team/subset"
    (file,) = document["distribution"]
    assert file["contentUrl"] == f"{hub.endpoint}/datasets/team/subset/resolve/main/train.jsonl"


def test_what_is_pushed_is_read_from_the_hub_as_the_same_examples(
    job: Job, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The split is found by the data card; the file is that which the export names."""
    from huggingface_hub import constants

    manifest = job.run()
    job.passes("export", str(manifest), f"{ADDRESS}/data/rows.jsonl", "--format", "sharegpt")
    with hub_server.serve(hub_server.Hub()) as reading:
        files = hub.datasets["team/subset"].files
        reading.datasets = {"team/subset": {hub_server.COMMIT: files}}
        monkeypatch.setattr(constants, "ENDPOINT", reading.endpoint)
        template = f"{reading.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(job.folder / "cache"))
        again = job.copy(candidates={"uris": [ADDRESS]})
        again.document["metadata"]["name"] = "again"
        ids = {row["example_id"] for row in table_of(manifest, "selected")}
        again.spec["selection"] = {"keep": "highest", "budget": {"fraction": 1.0}}
        second = again.run()
        assert {row["example_id"] for row in table_of(second, "scores")} == ids
        job.passes("export", str(second), str(job.folder / "second" / "rows.jsonl"), "--card")
    card = (job.folder / "second" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["source_datasets"] == ["team/subset"]
    assert f"| {ADDRESS}@{hub_server.COMMIT}/data/rows.jsonl | 4 |" in card
    document = json.loads((job.folder / "second" / "croissant.json").read_text())
    page = f"https://huggingface.co/datasets/team/subset/tree/{hub_server.COMMIT}"
    assert document["isBasedOn"] == [page]


def test_a_push_again_commits_nothing_and_one_of_other_content_is_refused(job: Job, hub: Hub) -> None:
    manifest = str(job.run())
    for name in ("train.jsonl", "data/train.parquet"):  # a plain file, and one under LFS
        options = ["--no-card"] if "/" in name else []
        assert not job.passes("export", manifest, f"{ADDRESS}/{name}", *options)["unchanged"]
        before = dict(hub.datasets["team/subset"].files)
        assert job.passes("export", manifest, f"{ADDRESS}/{name}", *options)["unchanged"]
        job.refuses(
            ("export", manifest, f"{ADDRESS}/{name}", "--format", "trl", *options), 64, "other content", ADDRESS
        )
        assert hub.datasets["team/subset"].files == before
    assert len(hub.datasets["team/subset"].commits) == 3


def test_a_push_adds_the_files_that_are_missing(job: Job, hub: Hub) -> None:
    manifest = str(job.run())
    job.passes("export", manifest, ADDRESS, "--public")
    assert hub.datasets["team/subset"].visibility == "public"
    whole = dict(hub.datasets["team/subset"].files)
    del hub.datasets["team/subset"].files["README.md"]
    assert not job.passes("export", manifest, ADDRESS)["unchanged"]
    assert hub.datasets["team/subset"].files == whole


REFUSED: list[tuple[str | None, str, tuple[str, ...]]] = [
    (None, ADDRESS, ("no token", "HF_TOKEN")),
    ("hf_wrong", ADDRESS, ("does not accept the token", "HF_TOKEN")),
    (READ_TOKEN, ADDRESS, ("may not write", "rights")),
    (READ_TOKEN, "hf://datasets/team/there", ("may not write", "create_pr=1")),
    (TOKEN, "hf://datasets/other/subset", ("may not write", "other/subset")),
    (TOKEN, "hf://datasets/subset", ("not the address", "hf://datasets/ORG/NAME")),
    (TOKEN, "hf://team/subset", ("not the address",)),
    (TOKEN, f"{ADDRESS}@branch/a.jsonl", ("not the address", "main")),
    (TOKEN, f"{ADDRESS}/../a.jsonl", ("not the address",)),
    (TOKEN, f"{ADDRESS}/a.csv", ("no known file ending", ".jsonl")),
    (TOKEN, "hf://datasets/team/-bad-", ("not the name of a data set",)),
]


def test_a_push_that_cannot_succeed_states_why(job: Job, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = str(job.run())
    hub.datasets["team/there"] = DataSet("public")
    for token, address, mentions in REFUSED:
        monkeypatch.setenv("HF_TOKEN", token or "")
        job.refuses(("export", manifest, address), 64, *mentions)
    assert hub.datasets == {"team/there": DataSet("public")}, "nothing was created or committed"


def test_an_error_of_a_push_shows_no_signed_address() -> None:
    from huggingface_hub.errors import HfHubHTTPError

    answer: Any = SimpleNamespace(status_code=503, headers={}, request=None)
    text = "Server error '503' for url 'https://bucket.example.invalid/a?X-Amz-Signature=secret'"
    with pytest.raises(TransientError, match=r"example\.invalid/a") as raised, hub_push._hub_errors("here"):
        raise HfHubHTTPError(text, response=answer)
    assert "secret" not in str(raised.value)


def test_a_hub_that_fails_or_moves_on_is_a_transient_error(job: Job, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    manifest = str(job.run())
    for status in (429, 503):
        hub.status = status
        job.refuses(("export", manifest, ADDRESS), 75, "the hub failed", ADDRESS)
    hub.status, hub.moved_on = None, True
    job.refuses(("export", manifest, ADDRESS), 75, "at the same moment", "export again")
    hub.moved_on = False
    assert not job.passes("export", manifest, ADDRESS)["unchanged"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    job.refuses(("export", manifest, ADDRESS), 64, "HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    job.refuses(("export", manifest, ADDRESS), 75, "does not answer", "HF_ENDPOINT")
