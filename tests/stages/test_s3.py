"""The same run over S3 (moto's server, real HTTP) as over folders, and what S3 answers to bad requests."""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import http.server
import io
import json
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from prism_job.errors import DataError, PrismError, RequestError, TransientError
from prism_job.storage import model_files, retries
from prism_job.storage import s3 as s3_client
from prism_job.storage.address import open_store
from tests.conftest import Job, candidate, point_at, write_jsonl


def on_s3(job: Job, client: Any) -> Job:
    for path in [*(job.folder / "pool").iterdir(), job.folder / "targets.jsonl"]:
        client.upload_file(str(path), "corpora", path.relative_to(job.folder).as_posix())
    return job.copy(
        candidates={"uris": ["s3://corpora/pool/"]},
        targets={"uris": ["s3://corpora/targets.jsonl"]},
        store="s3://prism/gradients",
        output="s3://prism/selections",
    )


def selected_ids(content: bytes) -> list[tuple[str, float]]:
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(content))
    return list(zip(table["example_id"].to_pylist(), table["score"].to_pylist(), strict=True))


def test_a_run_over_s3_selects_what_a_run_over_folders_selects(job: Job, s3: Any) -> None:
    local = job.run()
    remote = on_s3(job, s3)
    for stage in ("plan", "extract", "reduce"):
        code, words = remote.stage(stage)
        assert code == 0, words
    assert words["manifest"].startswith("s3://prism/selections/test/")
    store = open_store("s3://prism")
    key = words["manifest"].removeprefix("s3://prism/").replace("manifest.json", "selected.parquet")
    content = store.get(key)
    assert selected_ids(content) == selected_ids((local.parent / "selected.parquet").read_bytes())
    stated = json.loads(store.get(words["manifest"].removeprefix("s3://prism/")))["files"]["selected.parquet"]
    assert hashlib.sha256(content).hexdigest() == stated["sha256"]
    assert remote.stage("plan")[1]["missing"] == 0
    code, exported = remote.call("export", words["manifest"], "s3://prism/exports/subset.jsonl")
    assert (code, exported["rows"]) == (0, 4)
    assert len(store.get("exports/subset.jsonl").splitlines()) == 4
    assert remote.call("evaluate", words["manifest"])[0] == 0


def test_a_model_on_s3_gives_the_shards_of_the_same_model_in_a_folder(
    job: Job, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRISM_CACHE", str(job.folder / "cache"))
    for path in Path(job.spec["model"]["uri"]).iterdir():
        s3.upload_file(str(path), "corpora", f"model/{path.name}")
    local = job.run()
    job.spec["model"]["uri"] = "s3://corpora/model"
    remote = job.run()
    assert selected_ids((remote.parent / "selected.parquet").read_bytes()) == selected_ids(
        (local.parent / "selected.parquet").read_bytes()
    )


def test_a_missing_bucket_is_named(job: Job, s3: Any) -> None:
    job.spec["candidates"]["uris"] = ["s3://no-such-bucket/pool/"]
    job.fails("plan", 64, "no-such-bucket", "no such bucket")


def test_an_empty_prefix_is_named(job: Job, s3: Any) -> None:
    job.spec["candidates"]["uris"] = ["s3://corpora/nothing-here/"]
    job.fails("plan", 64, "s3://corpora/nothing-here/", "nothing there")


def test_missing_credentials_are_named(job: Job, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_client._client.cache_clear()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    on_s3_ = job.copy(candidates={"uris": ["s3://corpora/pool/"]})
    on_s3_.fails("plan", 64, "credentials", "AWS_ACCESS_KEY_ID")


def test_a_server_that_does_not_answer_is_a_transient_error(job: Job, no_pauses: pytest.MonkeyPatch) -> None:
    # Port 9 of this machine: nobody listens, every try is refused at once; only the pauses between tries are cut.
    point_at("http://127.0.0.1:9", no_pauses)
    job.spec["candidates"]["uris"] = ["s3://corpora/pool/"]
    job.fails("plan", 75, "s3://corpora", "AWS_ENDPOINT_URL", f"{retries.MAX_TRIES} tries")
    assert job.events[-1]["retries"] == retries.MAX_TRIES - 1


def test_an_invalid_endpoint_is_named(job: Job, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at("nowhere", monkeypatch)
    job.spec["candidates"]["uris"] = ["s3://corpora/pool/"]
    job.fails("plan", 64, "nowhere", "AWS_ENDPOINT_URL")


class RoughServer:
    """Answers a GET with the next of `answers`: (status, bytes sent, bytes promised); counts what it was asked."""

    def __init__(self, *answers: tuple[int, bytes, int]) -> None:
        asked = self.asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                status, body, promised = answers[min(len(asked), len(answers)) - 1]
                self.send_response(status)
                self.send_header("Content-Length", str(promised))
                if status == 200:
                    self.send_header("x-amz-checksum-crc32", CRC32_OF_ROW)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> RoughServer:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


ROW = b"a row of bytes"
CRC32_OF_ROW = base64.b64encode(zlib.crc32(ROW).to_bytes(4, "big")).decode()
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@pytest.fixture
def rough(no_pauses: pytest.MonkeyPatch) -> Iterator[Callable[..., RoughServer]]:
    """Starts a RoughServer and points the job at it."""
    with contextlib.ExitStack() as stack:

        def start(*answers: tuple[int, bytes, int]) -> RoughServer:
            server = stack.enter_context(RoughServer(*answers))
            point_at(f"http://127.0.0.1:{server.server.server_port}", no_pauses)
            return server

        yield start


SLOW = (503, SLOW_DOWN, len(SLOW_DOWN))
CUT_SHORT = (200, ROW[:5], len(ROW))
CHANGED = (200, ROW.upper(), len(ROW))
WHOLE = (200, ROW, len(ROW))
Rough = Callable[..., RoughServer]


@pytest.mark.parametrize("bad", [SLOW, CUT_SHORT, CHANGED], ids=["SlowDown", "cut short", "changed on the way"])
def test_a_bad_response_is_retried_and_counted(rough: Rough, bad: tuple[int, bytes, int]) -> None:
    server, before = rough(bad, bad, WHOLE), retries.num_retries()
    assert open_store("s3://bucket/x").get("row") == ROW
    assert len(server.asked) == 3
    assert retries.num_retries() - before == 2


@pytest.mark.parametrize(
    ("bad", "says"),
    [(SLOW, "SlowDown"), (CUT_SHORT, "cut off or changed on the way"), (CHANGED, "cut off or changed on the way")],
    ids=["SlowDown", "cut short", "changed on the way"],
)
def test_retries_are_bounded(rough: Rough, bad: tuple[int, bytes, int], says: str) -> None:
    server = rough(bad)
    with pytest.raises(TransientError, match=says) as ended:
        open_store("s3://bucket/x").get("row")
    assert ended.value.where == "s3://bucket/x/row"
    assert len(server.asked) == retries.MAX_TRIES
    assert re.search(rf"\({retries.MAX_TRIES} tries in \d+ s\)$", ended.value.what)


def test_all_waits_together_take_about_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("tenacity.nap.sleep_using_event.__call__", lambda _, seconds: waits.append(seconds))

    def ask() -> None:
        raise TransientError("no", where="here", fix="wait")

    for _ in range(20):
        waits.clear()
        with pytest.raises(TransientError):
            retries.with_retries(ask)
        assert len(waits) == retries.MAX_TRIES - 1
        assert 39 < sum(waits) < 80


def test_a_missing_output_bucket_is_named_before_anything_is_read_and_at_export(job: Job, s3: Any) -> None:
    manifest = job.run()
    code, words = job.call("export", str(manifest), "s3://no-such-bucket/subset.jsonl")
    assert (code, words["error"]) == (64, "no such bucket")
    job.spec["output"] = "s3://no-such-bucket/selections"
    job.spec["candidates"]["uris"] = ["s3://corpora/nothing-here/"]
    job.fails("plan", 64, "no-such-bucket", "no such bucket")


@pytest.mark.parametrize(
    ("status", "code", "family", "says"),
    [
        (403, "AccessDenied", RequestError, "denies access"),
        (301, "PermanentRedirect", RequestError, "check bucket, region and endpoint"),
        (400, "AuthorizationHeaderMalformed", RequestError, "refuses the request"),
        (404, "NoSuchKey", DataError, "no such object"),
        (412, "PreconditionFailed", DataError, "changed while it was read"),
        (400, "RequestTimeout", TransientError, "run again later"),
        (500, "InternalError", TransientError, "run again later"),
    ],
)
def test_each_error_code_of_s3_has_its_family(
    rough: Rough, status: int, code: str, family: type[PrismError], says: str
) -> None:
    body = f"<Error><Code>{code}</Code><Message>No.</Message></Error>".encode()
    server = rough((status, body, len(body)))
    with pytest.raises(family) as refusal:
        open_store("s3://bucket/x").get("row")
    # What is permanent is never asked twice.
    assert len(server.asked) == (retries.MAX_TRIES if family is TransientError else 1)
    assert says in str(refusal.value)
    assert refusal.value.where == "s3://bucket/x/row"


def test_a_truncated_object_on_s3_is_refused_by_name(job: Job, s3: Any) -> None:
    remote = on_s3(job, s3)
    for stage in ("plan", "extract"):
        assert remote.stage(stage)[0] == 0
    shard = next(
        listed
        for listed in open_store("s3://prism/gradients").list()
        if listed.key.endswith(".safetensors") and listed.key.count(".") == 1
    )
    store = open_store("s3://prism/gradients")
    store.put(shard.key, store.get(shard.key)[:-100])
    code, words = remote.stage("reduce")
    assert code == 65
    assert shard.key in words["where"]


def test_a_folder_and_a_prefix_behave_alike(job: Job, s3: Any) -> None:
    for uri in (str(job.folder / "objects"), "s3://prism/objects"):
        store = open_store(uri)
        assert not store.exists("a/b")
        store.put("a/b", b"one")
        store.put("a/b", b"two")
        store.put("c", b"")
        path = write_jsonl(job.folder / "x.jsonl", [candidate(1)])
        store.put_file("a/d", path)
        assert store.get("a/b") == b"two"
        assert store.get("a/d") == path.read_bytes()
        assert [listed.key for listed in store.list()] == ["a/b", "a/d", "c"]
        assert [listed.key for listed in store.list("a/")] == ["a/b", "a/d"]
        assert [listed.size_bytes for listed in store.list("a/b")] == [3]
        store.download("a/b", job.folder / "down")
        assert (job.folder / "down").read_bytes() == b"two"


def test_a_denied_head_request_does_not_mean_absent(rough: Callable[..., RoughServer]) -> None:
    handler: Any = rough((403, b"", 0)).server.RequestHandlerClass
    handler.do_HEAD = handler.do_GET
    with pytest.raises(RequestError, match="denies access") as refusal:
        open_store("s3://bucket/x").exists("row")
    assert refusal.value.where == "s3://bucket/x/row"


def test_other_bytes_of_the_same_size_are_another_model(tiny_model: Path, s3: Any) -> None:
    for path in tiny_model.iterdir():
        s3.upload_file(str(path), "corpora", f"model/{path.name}")
    before = model_files.identify("s3://corpora/model")
    content = bytearray((tiny_model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    s3.put_object(Bucket="corpora", Key="model/model.safetensors", Body=bytes(content))
    after = model_files.identify("s3://corpora/model")
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}


def test_a_put_in_a_folder_shows_nothing_until_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path / "store"))
    store.put("old", b"old bytes")
    seen = []

    def half(source: IO[bytes], target: IO[bytes], *_: object) -> None:
        target.write(source.read()[:4])
        target.flush()
        seen.append(([listed.key for listed in store.list()], store.exists("new"), store.get("old")))
        raise OSError(errno.EIO, "broke off")

    source = tmp_path / "source"
    source.write_bytes(b"new bytes")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", half)
        for key in ("new", "old"):
            for put in (lambda key: store.put(key, b"new bytes"), lambda key: store.put_file(key, source)):
                with pytest.raises(TransientError, match="broke off"):
                    put(key)
    assert seen == [(["old"], False, b"old bytes")] * 4, "neither in the listing nor by name"
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["old"]
    assert store.get("old") == b"old bytes"


def test_a_half_written_file_is_not_listed(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("a/b", b"whole")
    (tmp_path / "a" / ".put-1234").write_bytes(b"hal")
    assert [listed.key for listed in store.list()] == ["a/b"]
    assert [listed.key for listed in store.list("a/")] == ["a/b"]


def test_a_file_put_in_a_folder_has_the_mode_of_the_umask(tmp_path: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    store = open_store(str(tmp_path / "store"))
    store.put("bytes", b"x")
    (tmp_path / "source").write_bytes(b"x")
    (tmp_path / "source").chmod(0o600)
    store.put_file("file", tmp_path / "source")
    for name in ("bytes", "file"):
        assert (tmp_path / "store" / name).stat().st_mode & 0o777 == 0o666 & ~umask
