"""A model on S3 is downloaded once a node, whole or not at all, and goes on where it was cut off."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from prism_job.errors import DataError, RequestError, TransientError
from prism_job.storage import model_files
from prism_job.storage.s3 import S3Prefix
from tests.conftest import point_at
from tests.unreliable_proxy import UnreliableProxy

PIECE_BYTES = 2**14
NUM_PIECES = 40
WEIGHTS = random.Random(0).randbytes((NUM_PIECES - 1) * PIECE_BYTES + 7)
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "tokenizer.json": b'{"a": 1}'}

FETCH = f"""
from prism_job.storage import model_files, transfers
transfers.PIECE_BYTES = {PIECE_BYTES}
print(model_files.fetch_model("s3://corpora/model"), flush=True)
"""
"""What each rank of a node does, as a process of its own."""


@pytest.fixture
def model(s3: Any, no_pauses: pytest.MonkeyPatch) -> str:
    no_pauses.setattr("prism_job.storage.transfers.PIECE_BYTES", PIECE_BYTES)
    for name, content in FILES.items():
        s3.put_object(Bucket="corpora", Key=f"model/{name}", Body=content)
    s3.put_object(Bucket="corpora", Key="model/pytorch_model.bin", Body=b"a pickle, never touched")
    return "s3://corpora/model"


def rank() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", FETCH], stdout=subprocess.PIPE, text=True)


def gets(proxy: UnreliableProxy) -> list[str]:
    """Contents asked for: neither listings nor HEADs."""
    return [path for method, path in proxy.paths if method == "GET" and "list-type" not in path]


def whole(folder: Path) -> bool:
    return {path.name: path.read_bytes() for path in folder.iterdir()} == FILES


def test_the_ranks_of_a_node_share_one_download(s3: Any, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with UnreliableProxy(s3.meta.endpoint_url, 1.0, seed=0, kinds=("delay",), delay_seconds=0.05) as proxy:
        point_at(proxy.url, monkeypatch)
        ranks = [rank() for _ in range(3)]
        folders = {process.communicate(timeout=120)[0].strip() for process in ranks}
    assert [process.returncode for process in ranks] == [0, 0, 0]
    assert len(folders) == 1
    assert whole(Path(folders.pop()))
    assert len(gets(proxy)) == NUM_PIECES + 2


def test_a_killed_rank_blocks_nobody_and_its_pieces_are_kept(
    s3: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with UnreliableProxy(s3.meta.endpoint_url, 1.0, seed=0, kinds=("delay",), delay_seconds=0.1) as proxy:
        point_at(proxy.url, monkeypatch)
        first = rank()
        while len(gets(proxy)) < NUM_PIECES // 2:
            assert first.poll() is None
            time.sleep(0.01)
        first.send_signal(signal.SIGKILL)
        first.wait()
        cache = model_files.cache_folder()
        assert not list(cache.glob("*/model.safetensors"))
        index = next(cache.glob("*/model.safetensors.part.index")).read_text()
        noted = len(index.splitlines()) - 1
        arrived = -1
        while arrived < (arrived := len(proxy.paths)):  # what it sent before it died may still be on its way
            time.sleep(0.1)
        assert (
            noted >= NUM_PIECES // 2 - 1 - 2 * 8
        )  # at most two rounds of eight streams were asked for and not yet noted
        proxy.paths.clear()
        assert whole(model_files.fetch_model(model))
    asked = [path for path in gets(proxy) if "model.safetensors" in path]
    assert len(asked) == NUM_PIECES - noted


def test_an_interrupted_download_is_no_model_and_resumes_later(
    s3: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, sent = S3Prefix._get_piece, []

    def breaks_off(self: S3Prefix, key: str, *rest: Any) -> bytes:
        if len(sent) == 30:
            raise TransientError("the line is dead", where=key, fix="wait")
        sent.append(key)
        return honest(self, key, *rest)

    with monkeypatch.context() as broken:
        broken.setattr(S3Prefix, "_get_piece", breaks_off)
        with pytest.raises(TransientError, match="the line is dead"):
            model_files.fetch_model(model)
    assert not list(model_files.cache_folder().glob("*/model.safetensors"))
    with UnreliableProxy(s3.meta.endpoint_url, 0.2, seed=4, delay_seconds=0.0) as proxy:
        point_at(proxy.url, monkeypatch)
        folder = model_files.fetch_model(model)
        assert whole(folder)
        proxy.paths.clear()
        assert model_files.fetch_model(model) == folder
        assert not gets(proxy)


def test_a_model_that_changes_while_it_is_read_is_refused(s3: Any, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, sent = S3Prefix._get_piece, []

    def overwritten(self: S3Prefix, key: str, *rest: Any) -> bytes:
        sent.append(key)
        if len(sent) == 10:
            s3.put_object(Bucket="corpora", Key="model/model.safetensors", Body=bytes(len(WEIGHTS)))
        return honest(self, key, *rest)

    with monkeypatch.context() as busy:
        busy.setattr(S3Prefix, "_get_piece", overwritten)
        with pytest.raises(DataError, match="changed while it was read"):
            model_files.fetch_model(model)
    # What is there now is another model, with a folder of its own.
    assert (model_files.fetch_model(model) / "model.safetensors").read_bytes() == bytes(len(WEIGHTS))


def test_a_model_that_fails_its_checksum_is_refused(s3: Any, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = S3Prefix._get_piece

    def one_bit_off(self: S3Prefix, key: str, *rest: Any) -> bytes:
        content = honest(self, key, *rest)
        return bytes([content[0] ^ 1]) + content[1:] if key == "model.safetensors" else content

    with monkeypatch.context() as changed:
        changed.setattr(S3Prefix, "_get_piece", one_bit_off)
        with pytest.raises(TransientError, match="fails its CRC32"):
            model_files.fetch_model(model)
    assert not list(model_files.cache_folder().glob("*/model.safetensors*"))
    assert whole(model_files.fetch_model(model))


def test_one_gguf_file_costs_one_page_and_is_downloaded_alone(
    s3: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put_object(Bucket="corpora", Key="model/tiny.gguf", Body=WEIGHTS)
    s3.put_object(Bucket="corpora", Key="model/tiny.gguf.txt", Body=b"not asked for")
    with UnreliableProxy(s3.meta.endpoint_url, 0.0, seed=0) as proxy:
        point_at(proxy.url, monkeypatch)
        path = model_files.fetch_model(f"{model}/tiny.gguf")
        assert len([path for _, path in proxy.paths if "list-type" in path]) == 1
    assert (path.name, path.read_bytes()) == ("tiny.gguf", WEIGHTS)
    assert [other.name for other in path.parent.iterdir()] == ["tiny.gguf"]
    with pytest.raises(RequestError, match="no such GGUF file"):
        model_files.fetch_model(f"{model}/tiny.ggu.gguf")


def test_a_cache_that_cannot_be_written_is_named(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PRISM_CACHE", str(tmp_path / "file"))
    with pytest.raises(RequestError, match="model cache cannot be written") as refusal:
        model_files.fetch_model(model)
    assert "PRISM_CACHE" in refusal.value.fix
