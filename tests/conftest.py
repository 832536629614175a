"""One rig for all tests of the job: a tiny model, small data, and the stages run as `python -m prism_job` would.

Imports nothing of the job's packages by itself: the launcher's tests run where torch is not installed.
"""

from __future__ import annotations

import copy
import json
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest's workers share the cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

if TYPE_CHECKING:
    from tests.cluster.rig import Rig

Row = dict[str, Any]

# How long an example takes says more about the machine, which other workers use too, than about the test.
settings.register_profile("shared-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared-machine")


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def candidate(number: int) -> Row:
    answer = "yes " * (1 + number % 5) + f"number {number}"
    return {"messages": [turn("user", f"Say {number}"), turn("assistant", answer)], "label": number % 2}


def pair(number: int) -> Row:
    return {
        "prompt": [turn("user", f"Capital of {number}?")],
        "chosen": [turn("assistant", f"Paris {number}")],
        "rejected": [turn("assistant", f"Rome {number} or not")],
    }


def write_jsonl(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def job_packages() -> None:
    """Skips a test that runs the job itself where only the launcher is installed."""
    pytest.importorskip("torch", reason="the job's packages are not installed")


@pytest.fixture(scope="session")
def tiny_model(job_packages: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.models import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("model"))


def made_rig(folder: Path, model: Path, server: str, **options: Any) -> Any:
    """A rig on the "fake" or the "real" API server; skips where there is no real one."""
    from tests.cluster.real import missing_binaries
    from tests.cluster.rig import rig

    if server == "real" and (reason := missing_binaries()):
        pytest.skip(f"no real control plane: {reason}")
    return rig(folder, model, real=server == "real", **options)


@pytest.fixture(scope="module", params=["fake", "real"])
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, request: Any) -> Iterator[Rig]:
    """A whole cluster, with the custom resource."""
    with made_rig(tmp_path_factory.mktemp("rig"), tiny_model, request.param) as made:
        yield made


@pytest.fixture(scope="module", params=["fake", "real"])
def bare(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, request: Any) -> Iterator[Rig]:
    """A whole cluster without the custom resource: records are ConfigMaps."""
    with made_rig(tmp_path_factory.mktemp("bare"), tiny_model, request.param, with_crd=False) as made:
        yield made


STAGES = ("plan", "extract", "reduce")


def table_of(manifest: Path, name: str) -> list[Row]:
    """Rows of a table of a selection: `scores`, `selected` or `targets`."""
    import pyarrow.parquet as pq

    return pq.read_table(manifest.parent / f"{name}.parquet").to_pylist()


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


class Job:
    """A run in a folder of its own. Change `document`, write data, call stages; each gives (exit code, termination message)."""

    def __init__(self, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.events: list[Row] = []
        write_jsonl(folder / "pool" / "a.jsonl", [candidate(number) for number in range(10)])
        write_jsonl(folder / "targets.jsonl", [pair(number) for number in range(3)])
        self.document: dict[str, Any] = {
            "apiVersion": "prism.dev/v1alpha1",
            "kind": "SelectionRun",
            "metadata": {"name": "test"},
            "spec": {
                "model": {"uri": str(model), "dtype": "float32"},
                "candidates": {"uris": [str(folder / "pool")]},
                "targets": {"uris": [str(folder / "targets.jsonl")]},
                "store": str(folder / "store"),
                "output": str(folder / "output"),
                "extraction": {
                    "maxLength": 128,
                    "tokensPerBatch": 4096,  # auto has its own laws: tests/extract/test_batch_size.py
                    "examplesPerShard": 4,
                    "projection": {"dim": 8},
                    "codec": {"kind": "sign", "dims": 512},
                },
                "selection": {"keep": "highest", "budget": {"count": 4}},
                # Most laws are about the rows of the run alone; test_audit.py switches this on.
                "audit": {"examples": 0},
            },
        }

    @property
    def spec(self) -> dict[str, Any]:
        return self.document["spec"]

    def copy(self, **changes: Any) -> Job:
        """The same run with other top-level fields of the spec."""
        other = copy.copy(self)
        other.document = copy.deepcopy(self.document)
        other.document["spec"] |= changes
        return other

    def spec_path(self) -> Path:
        path = self.folder / "selection.yaml"
        path.write_text(yaml.safe_dump(self.document))
        return path

    def call(self, *arguments: str) -> tuple[int, Row]:
        from prism_job.__main__ import main

        self.capsys.readouterr()
        code = main(list(arguments))
        self.events = [json.loads(line) for line in self.capsys.readouterr().out.splitlines()]
        return code, self.events[-1]

    def stage(self, name: str) -> tuple[int, Row]:
        return self.call(name, "--spec", str(self.spec_path()))

    def passes(self, *command: str) -> Row:
        """The message of a stage, or of another verb with its arguments, that ends with exit code 0."""
        code, message = self.stage(*command) if command[0] in STAGES else self.call(*command)
        assert code == 0, message
        return message

    def run(self) -> Path:
        """All three stages; the manifest's path."""
        *_, reduced = [self.passes(name) for name in STAGES]
        return Path(reduced["manifest"])

    def plan(self) -> Row:
        return self.passes("plan")

    def refuses(self, command: str | tuple[str, ...], code: int, *mentions: str) -> Row:
        """A stage or another verb ends with this exit code, and its message holds all of `mentions`."""
        found, message = self.stage(command) if isinstance(command, str) else self.call(*command)
        assert found == message["exitCode"] == code, message
        assert message["where"], message
        assert message["fix"], message
        text = f"{message['error']} {message['where']} {message['fix']}"
        for mention in mentions:
            assert mention in text, text
        return message

    def fails(self, stage: str, code: int, *mentions: str) -> Row:
        """The stages before `stage` pass, and it ends as `refuses` describes."""
        for name in STAGES[: STAGES.index(stage)]:
            self.passes(name)
        return self.refuses(stage, code, *mentions)

    def parsed(self) -> Any:
        from prism_job.spec.document import parse_spec

        return parse_spec(self.spec_path().read_text(), "selection.yaml")

    def planned(self) -> Any:
        """The plan that the plan stage published."""
        from prism_job.plan.plan import read_plan

        return read_plan(self.parsed())

    def store(self) -> Any:
        from prism_job.storage.address import open_store

        return open_store(self.spec["store"])

    def shards(self) -> list[tuple[str, Any, str]]:
        """(extractor, kind, unit) of every shard that the plan names."""
        plan = self.planned()
        forms = [(plan.extractor, plan.candidates, "targets", plan.factors)]
        forms += [(plan.audit.extractor, plan.audit.units, plan.audit_kind, plan.audit.factors)] if plan.audit else []
        forms += [(plan.preference.extractor, [], "nll", [])] if plan.preference else []
        return [
            (extractor, kind, unit)
            for extractor, candidates, of_targets, factors in forms
            for kind, units in (("candidates", candidates), (of_targets, plan.targets), ("factors", factors))
            for unit in (units if kind == "factors" else [unit.id for unit in units])
        ]

    def use_codec(self, kind: str) -> None:
        self.spec["extraction"]["codec"] = {"kind": kind} | ({"dims": 512} if kind == "sign" else {})


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> Job:
    return Job(tmp_path, tiny_model, capsys)


def point_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the job's S3 is the server at that address."""
    from prism_job.storage import s3 as s3_client

    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    s3_client._client.cache_clear()


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """moto's server with the buckets `corpora` and `prism`, and a client of it; models are cached in `tmp_path`."""
    import boto3.session
    from moto.server import ThreadedMotoServer

    from prism_job.storage import s3 as s3_client

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    monkeypatch.setenv("PRISM_CACHE", str(tmp_path / "cache"))
    # moto keeps its buckets in the process, and the job its client: both begin anew with each test.
    urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/reset", data=b"").close()
    point_at(f"http://127.0.0.1:{port}", monkeypatch)
    client = boto3.session.Session().client("s3")
    client.create_bucket(Bucket="corpora")
    client.create_bucket(Bucket="prism")
    yield client
    server.stop()
    s3_client._client.cache_clear()


@pytest.fixture
def no_pauses(s3: Any, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As many tries as ever, without the waits between them."""
    monkeypatch.setattr("prism_job.storage.retries.FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.setattr("prism_job.storage.retries.MAX_WAIT_SECONDS", 0.0)
    return monkeypatch
