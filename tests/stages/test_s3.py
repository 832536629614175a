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
from tests.conftest import STAGES, Job, candidate, point_at, write_jsonl


def upload_model(folder: Path, client: Any) -> None:
    for path in folder.iterdir():
        client.upload_file(str(path), "corpora", f"model/{path.name}")


def on_s3(job: Job, client: Any) -> Job:
    """The same run with its data, its model, its store and its output on S3."""
    for path in [*(job.folder / "pool").iterdir(), job.folder / "targets.jsonl"]:
        client.upload_file(str(path), "corpora", path.relative_to(job.folder).as_posix())
    upload_model(Path(job.spec["model"]["uri"]), client)
    return job.copy(
        model=job.spec["model"] | {"uri": "s3://corpora/model"},
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
    *_, words = [remote.passes(stage) for stage in STAGES]
    assert words["manifest"].startswith("s3://prism/selections/test/")
    store = open_store("s3://prism")
    key = words["manifest"].removeprefix("s3://prism/").replace("manifest.json", "selected.parquet")
    content = store.get(key)
    assert selected_ids(content) == selected_ids((local.parent / "selected.parquet").read_bytes())
    stated = json.loads(store.get(words["manifest"].removeprefix("s3://prism/")))["files"]["selected.parquet"]
    assert hashlib.sha256(content).hexdigest() == stated["sha256"]
    assert remote.plan()["missing"] == 0
    assert remote.passes("export", words["manifest"], "s3://prism/exports/subset.jsonl")["rows"] == 4
    assert len(store.get("exports/subset.jsonl").splitlines()) == 4
    remote.passes("evaluate", words["manifest"])


@pytest.mark.parametrize(
    ("uri", "endpoint", "mentions"),
    [
        ("s3://no-such-bucket/pool/", None, ("no-such-bucket", "no such bucket")),
        ("s3://corpora/nothing-here/", None, ("s3://corpora/nothing-here/", "nothing there")),
        ("s3://corpora/pool/", "nowhere", ("nowhere", "AWS_ENDPOINT_URL")),
    ],
)
def test_a_missing_bucket_an_empty_prefix_and_an_invalid_endpoint_are_named(
    job: Job, s3: Any, uri: str, endpoint: str | None, mentions: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if endpoint:
        point_at(endpoint, monkeypatch)
    job.spec["candidates"]["uris"] = [uri]
    job.fails("plan", 64, *mentions)


def test_missing_credentials_are_named(job: Job, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_client._client.cache_clear()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    job.spec["candidates"]["uris"] = ["s3://corpora/pool/"]
    job.fails("plan", 64, "credentials", "AWS_ACCESS_KEY_ID")


def test_a_server_that_does_not_answer_is_a_transient_error(job: Job, no_pauses: pytest.MonkeyPatch) -> None:
    # Port 9 of this machine: nobody listens, every try is refused at once; only the pauses between tries are cut.
    point_at("http://127.0.0.1:9", no_pauses)
    job.spec["candidates"]["uris"] = ["s3://corpora/pool/"]
    job.fails("plan", 75, "s3://corpora", "AWS_ENDPOINT_URL", f"{retries.MAX_TRIES} tries")
    assert job.events[-1]["retries"] == retries.MAX_TRIES - 1


def test_a_server_that_does_not_answer_is_asked_for_one_address_and_hides_no_wrong_path(
    job: Job, no_pauses: pytest.MonkeyPatch
) -> None:
    point_at("http://127.0.0.1:9", no_pauses)
    job.spec["candidates"]["uris"] = ["s3://corpora/a.jsonl", "s3://corpora/b.jsonl"]
    job.spec["targets"]["uris"] = [str(job.folder / "no-pairs.jsonl")]
    job.fails("plan", 64, "2 addresses", "s3://corpora/a.jsonl", "no-pairs.jsonl", "spec.candidates, spec.targets")
    assert job.events[-1]["retries"] == retries.MAX_TRIES - 1


ROW = b"a row of bytes"
CRC32_OF_ROW = base64.b64encode(zlib.crc32(ROW).to_bytes(4, "big")).decode()
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


Answer = tuple[int, bytes, int]
"""Status, bytes sent, bytes promised."""
Rough = Callable[..., list[str]]


@pytest.fixture
def rough(no_pauses: pytest.MonkeyPatch) -> Iterator[Rough]:
    """Starts a server that answers with the next of `answers`, and points the job at it; gives the paths it was asked for."""
    with contextlib.ExitStack() as stack:

        def start(*answers: Answer, answers_head: bool = False) -> list[str]:
            asked: list[str] = []

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

            if answers_head:
                Handler.do_HEAD = Handler.do_GET  # type: ignore[attr-defined]
            server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            point_at(f"http://127.0.0.1:{server.server_port}", no_pauses)
            return asked

        yield start


SLOW = (503, SLOW_DOWN, len(SLOW_DOWN))
CUT_SHORT = (200, ROW[:5], len(ROW))
CHANGED = (200, ROW.upper(), len(ROW))
WHOLE = (200, ROW, len(ROW))


CHANGED_ON_THE_WAY = "cut off or changed on the way"


@pytest.mark.parametrize(
    ("bad", "says"),
    [(SLOW, "SlowDown"), (CUT_SHORT, CHANGED_ON_THE_WAY), (CHANGED, CHANGED_ON_THE_WAY)],
    ids=["SlowDown", "cut short", "changed on the way"],
)
def test_a_bad_response_is_retried_and_counted_and_retries_are_bounded(rough: Rough, bad: Answer, says: str) -> None:
    asked, before = rough(bad, bad, WHOLE), retries.num_retries()
    assert open_store("s3://bucket/x").get("row") == ROW
    assert len(asked) == 3
    assert retries.num_retries() - before == 2
    asked = rough(bad)
    with pytest.raises(TransientError, match=says) as ended:
        open_store("s3://bucket/x").get("row")
    assert ended.value.where == "s3://bucket/x/row"
    assert len(asked) == retries.MAX_TRIES
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
    job.refuses(("export", str(manifest), "s3://no-such-bucket/subset.jsonl"), 64, "no such bucket")
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
    asked = rough((status, body, len(body)))
    with pytest.raises(family) as refusal:
        open_store("s3://bucket/x").get("row")
    # What is permanent is never asked twice.
    assert len(asked) == (retries.MAX_TRIES if family is TransientError else 1)
    assert says in str(refusal.value)
    assert refusal.value.where == "s3://bucket/x/row"


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


def test_a_denied_head_request_does_not_mean_absent(rough: Rough) -> None:
    rough((403, b"", 0), answers_head=True)
    with pytest.raises(RequestError, match="denies access") as refusal:
        open_store("s3://bucket/x").exists("row")
    assert refusal.value.where == "s3://bucket/x/row"


def test_other_bytes_of_the_same_size_are_another_model(tiny_model: Path, s3: Any) -> None:
    upload_model(tiny_model, s3)
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
