"""Data sets of the hub: the real clients of `huggingface_hub` and `datasets` ask a local server. `datasets` is the oracle."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from launcher.doctor import bucket_probe
from prism_job.data import hub as hub_sources
from prism_job.errors import DataError, PrismError, RequestError, TransientError
from prism_job.plan.sources import list_sources
from prism_job.spec.hub_address import HubAddress
from tests.conftest import Job, Row, candidate, pair, read_json, table_of
from tests.data.hub_server import COMMIT, EXPIRED, NEXT_COMMIT, Hub, serve

CARD = """---
configs:
- config_name: chat
  data_files:
  - {split: train, path: chat/*.jsonl}
  - {split: test, path: [held_out.jsonl]}
- config_name: code
  data_files: code/**
- config_name: odd
  data_files: code.csv
  sep: ";"
- config_name: outside
  data_files: %s
---
# A data set
"""


def lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def texts(start: int, stop: int) -> list[Row]:
    return [{"text": f"row {number}"} for number in range(start, stop)]


def parquet(rows: list[Row]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


@pytest.fixture(scope="module")
def hub_client() -> Iterator[tuple[Hub, pytest.MonkeyPatch]]:
    """The clients read HF_ENDPOINT once, when they are imported; so their constants are set here."""
    patch = pytest.MonkeyPatch()
    with serve(Hub()) as hub:
        import datasets.config
        from huggingface_hub import constants

        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
        patch.setattr(
            datasets.config, "HUB_DATASETS_URL", hub.endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}"
        )
        for module, name in ((constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")):
            patch.setattr(module, name, False)
        patch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
        datasets.disable_progress_bars()
        yield hub, patch
    patch.undo()


@pytest.fixture
def hub(hub_client: tuple[Hub, pytest.MonkeyPatch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub, _ = hub_client
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("prism_job.storage.retries.MAX_TRIES", 1)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    hub.renamed, hub.gated, hub.down = {}, set(), False
    hub.datasets = {
        "org/configs": {
            COMMIT: {
                "README.md": (CARD % "code/**").encode(),
                "chat/b.jsonl": lines(texts(0, 3)),
                "chat/a.jsonl": lines(texts(3, 5)),
                "held_out.jsonl": lines(texts(5, 6)),
                "code/1/x.jsonl": lines(texts(6, 8)),
                "code/x.jsonl": lines(texts(8, 9)),
                "code.csv": b"a;b\n1;2\n",
            }
        },
        "org/plain": {
            COMMIT: {
                "README.md": b"# Nothing else\n",
                "data/train-00000-of-00002.parquet": parquet(texts(0, 2)),
                "data/train-00001-of-00002.parquet": parquet(texts(2, 4)),
                "data/test-00000-of-00001.parquet": parquet(texts(4, 5)),
                "data/notes.json": b"{}",
            }
        },
        "org/single": {
            COMMIT: {"pool.jsonl": lines(texts(0, 4)), ".gitattributes": b"", "scripts/run.py": b"raise SystemExit"}
        },
    }
    return hub


def read(uri: str) -> list[Any]:
    return [row for source in list_sources([uri])[0] for _, row in source.read()]


def at(repo: str, commit: str = COMMIT) -> str:
    return f"hf://datasets/{repo}@{commit}"


@pytest.mark.parametrize(
    ("repo", "config", "split"),
    [
        ("org/configs", "chat", "train"),
        ("org/configs", "chat", "test"),
        ("org/configs", "code", "train"),
        ("org/plain", None, "train"),
        ("org/plain", None, "test"),
        ("org/single", None, "train"),
    ],
)
def test_a_split_holds_the_rows_of_datasets_in_the_same_order(
    repo: str, config: str | None, split: str, hub: Hub
) -> None:
    import datasets

    expected = list(datasets.load_dataset(repo, config, split=split, revision=COMMIT, streaming=True))
    address = HubAddress(repo, config=config, split=split)
    assert read(str(address)) == expected
    assert read(str(address.at(COMMIT))) == expected
    assert HubAddress.parse(str(address.at(COMMIT))) == address.at(COMMIT)


def test_sources_name_the_commit_and_can_be_named_in_a_document(hub: Hub) -> None:
    sources, ignored = list_sources(["hf://datasets/org/plain?split=train"])
    names = [f"data/train-0000{number}-of-00002.parquet" for number in (0, 1)]
    assert [source.uri for source in sources] == [f"{at('org/plain')}/{name}" for name in names]
    assert ignored[f"{at('org/plain')}/data/test-00000-of-00001.parquet"] == "not a file of that split"
    assert read(sources[1].uri) == texts(2, 4)
    hub.datasets["org/plain"][COMMIT]["more/a b.jsonl"] = lines(texts(0, 1))
    assert read("hf://datasets/org/plain/more/a b.jsonl") == texts(0, 1)
    assert read("hf://datasets/org/configs/code") == [*texts(6, 8), *texts(8, 9)], "a folder, in key order"


def test_a_pinned_address_reads_the_same_commit_after_a_push(hub: Hub) -> None:
    uri = "hf://datasets/org/single"
    pinned = hub_sources.pin([uri, "s3://bucket/pool"])
    assert pinned == {uri: at("org/single")}
    hub.datasets["org/single"][NEXT_COMMIT] = {"pool.jsonl": lines(texts(9, 10))}
    assert read(uri) == texts(9, 10)
    assert read(pinned[uri]) == texts(0, 4)
    assert [source.uri for source in list_sources([uri], pinned)[0]] == [f"{at('org/single')}/pool.jsonl"]


@pytest.mark.parametrize(
    ("address", "says", "fix"),
    [
        ("org/nothing", "no such data set, or it is private", "HF_TOKEN"),
        ("org/plain@v9", "no such revision", "after '@'"),
        ("org/plain", "2 splits: train, test", "hf://datasets/org/plain?split=train"),
        ("org/plain?split=dev", "no split dev", "splits there: train, test"),
        ("org/configs", "4 configs: chat, code, odd, outside", "?config=chat"),
        ("org/configs?config=math", "no config math", "configs there: chat, code"),
        ("org/configs?config=odd", "the parameter sep", "hf://datasets/ORG/NAME/PATH"),
        ("org/plain/nowhere", "no such file or folder", "lists its files"),
        ("old/name?split=train", "is now called org/plain", "hf://datasets/org/plain?split=train"),
        ("org/single/scripts", "none is a data file", "PRISM reads .jsonl"),
    ],
)
def test_a_wrong_address_is_named_with_what_there_is(address: str, says: str, fix: str, hub: Hub) -> None:
    hub.renamed = {"old/name": "org/plain"}
    with pytest.raises(RequestError, match=says) as raised:
        read(f"hf://datasets/{address}")
    assert fix in raised.value.fix
    assert raised.value.where.startswith("hf://datasets/")


@pytest.mark.parametrize(
    "pattern",
    ["../../etc/*.json", "/etc/*.json", "https://example.invalid/a.jsonl", "file:/etc/*", "zip::a.json", "s3::a"],
)
def test_a_card_cannot_name_files_outside_its_data_set(pattern: str, hub: Hub) -> None:
    hub.datasets["org/configs"][COMMIT]["README.md"] = (CARD % json.dumps(pattern)).encode()
    with pytest.raises(RequestError, match="outside the data set"):
        read("hf://datasets/org/configs?config=outside")


def test_a_card_cannot_have_another_folder_searched(hub: Hub) -> None:
    hub.datasets["org/configs"][COMMIT]["README.md"] = (CARD % "a\n  data_dir: ../../..").encode()
    hub.datasets["org/plain"][COMMIT]["README.md"] = b"---\nconfigs: [{config_name: a, data_dir: ../../..}]\n---\n"
    for address in ("org/configs?config=outside", "org/plain"):
        with pytest.raises(RequestError, match=r"names \.\./\.\./\.\., outside the data set"):
            read(f"hf://datasets/{address}")


def test_file_names_that_no_folder_can_hold_are_an_error(hub: Hub) -> None:
    for name in ("a" * 300 + ".jsonl", "pool.jsonl/b.jsonl"):
        hub.datasets["org/single"][COMMIT] = {"pool.jsonl": b"", name: b""}
        with pytest.raises(RequestError, match="no data files are found"):
            read("hf://datasets/org/single")


def test_a_damaged_card_is_an_error(hub: Hub) -> None:
    hub.datasets["org/configs"][COMMIT]["README.md"] = b"---\nconfigs: [{config_name: a, data_files: 5}]\n---\n"
    with pytest.raises(DataError, match=r"README\.md cannot be read"):
        read("hf://datasets/org/configs")
    for wrong in ("data_dir: 5", "data_dir: [a]", "data_files: []", 'data_files: "a\\0b"'):
        card = f"---\nconfigs:\n- config_name: a\n  {wrong}\n---\n"
        name = f"org/{len(hub.datasets)}"  # a file at a commit is downloaded once
        hub.datasets[name] = {COMMIT: {"README.md": card.encode(), "a.jsonl": b""}}
        with pytest.raises(RequestError, match="no data files are found"):
            read(f"hf://datasets/{name}")


def test_a_file_name_of_the_hub_with_control_characters_is_refused(hub: Hub) -> None:
    hub.datasets["org/single"][COMMIT]["a\x1b[2J.jsonl"] = b""
    with pytest.raises(RequestError, match=r"cannot be printed: 'a\\x1b"):
        read("hf://datasets/org/single")


def test_a_cache_that_cannot_be_written_is_no_fault_of_the_hub() -> None:
    for error, says in (
        (PermissionError(13, "Permission denied", "/cache"), "Permission denied\n  where: /cache"),
        (OSError(28, "No space left on device"), "no space left on the device\n  where: hf://datasets/org/a"),
    ):
        with pytest.raises(PrismError, match=says), hub_sources._hub_errors("hf://datasets/org/a", "org/a"):
            raise error


def test_an_error_of_the_hub_shows_no_signed_address() -> None:
    error = OSError("403 Forbidden: https://cdn.example.invalid/a.parquet?Expires=9&Signature=secret Try again")
    with (
        pytest.raises(TransientError, match=r"a\.parquet Try again") as raised,
        hub_sources._hub_errors("here", "org/a"),
    ):
        raise error
    assert "secret" not in str(raised.value)


def test_a_gated_data_set_asks_for_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated, hub.token = {"org/single"}, "hf_right"
    for token in (None, "hf_of_another_account"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(RequestError, match="gated") as raised:
            read("hf://datasets/org/single")
        assert "https://huggingface.co/datasets/org/single" in raised.value.fix
        assert "HF_TOKEN" in raised.value.fix
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert read("hf://datasets/org/single") == texts(0, 4)


def test_a_token_that_is_not_valid_is_named_although_the_data_set_is_public(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", EXPIRED)
    with pytest.raises(RequestError, match=r"the hub refuses: .*Invalid credentials") as raised:
        read("hf://datasets/org/single")
    assert "check HF_TOKEN" in raised.value.fix


def test_without_the_hub_the_error_says_what_to_do(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.down = True
    with pytest.raises(TransientError, match="does not answer"):
        read("hf://datasets/org/single")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RequestError, match="HF_HUB_OFFLINE") as raised:
        read("hf://datasets/org/single")
    assert "hf download" in raised.value.fix


def test_the_probe_of_doctor_asks_the_hub(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    addresses = ["hf://datasets/org/single", "hf://datasets/org/nothing"]
    monkeypatch.setattr("sys.argv", ["-c", json.dumps([["read", address] for address in addresses])])
    with pytest.raises(SystemExit):
        exec(bucket_probe.SCRIPT, {})
    found, missing = map(json.loads, capsys.readouterr().out.splitlines())
    assert found["can"] == f"found {at('org/single')}"
    assert "no such data set" in missing["error"]


def test_a_run_selects_the_same_rows_from_the_hub_a_saved_data_set_a_manifest_and_json_lines(
    job: Job, hub: Hub
) -> None:
    import datasets

    rows, pairs = [candidate(number) for number in range(8)], [pair(number) for number in range(3)]
    hub.datasets["org/pool"] = {COMMIT: {"train.jsonl": lines(rows), "test.jsonl": lines(rows[:1])}}
    hub.datasets["org/pairs"] = {COMMIT: {"pairs.parquet": parquet(pairs)}}
    datasets.Dataset.from_list(rows).save_to_disk(job.folder / "saved")
    (job.folder / "pool" / "a.jsonl").write_bytes(lines(rows))

    everything = job.copy(selection={"keep": "highest", "budget": {"fraction": 1.0}})
    sources = {
        "jsonl": str(job.folder / "pool"),
        "saved": str(job.folder / "saved"),
        "manifest": str(everything.run()),
        "hub": "hf://datasets/org/pool?split=train",
    }
    selected: dict[str, list[str]] = {}
    for name, uri in sources.items():
        run = job.copy(candidates={"uris": [uri]})
        if name == "hub":
            run.spec["targets"] = {"uris": ["hf://datasets/org/pairs"]}
        manifest = run.run()
        selected[name] = [row["example_id"] for row in table_of(manifest, "selected")]
    assert len(selected["jsonl"]) == 4
    assert all(ids == selected["jsonl"] for ids in selected.values()), selected

    replay = yaml.safe_load((manifest.parent / "spec.yaml").read_text())
    assert replay["spec"]["candidates"]["uris"] == [f"{at('org/pool')}?split=train"]
    assert replay["spec"]["targets"]["uris"] == [at("org/pairs")]
    assert read_json(manifest.parent / "plan.json")["sources"] == [f"{at('org/pool')}/train.jsonl"]
    hub.datasets["org/pool"][NEXT_COMMIT] = {"train.jsonl": lines([candidate(99)])}
    again = job.copy()
    again.document = replay
    assert again.run() == manifest, "the commit that was read is read again"
