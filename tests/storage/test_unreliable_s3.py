"""S3 through a proxy that spoils a fifth of the requests: the same results; and which requests are sent."""

from __future__ import annotations

import hashlib
import itertools
import random
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from prism_job.errors import TransientError
from prism_job.storage import checksums, retries, transfers
from prism_job.storage.address import open_store
from prism_job.storage.s3 import S3Prefix
from prism_job.store import shards, staged_rows
from tests.conftest import STAGES, Job, point_at
from tests.stages.test_s3 import on_s3
from tests.unreliable_proxy import UnreliableProxy

PAGE = 1000
"""Objects of one page of a listing, on S3 as on moto."""


def fill(bucket: str, keys: list[str]) -> None:
    """Objects laid straight into moto's memory: thousands of puts would take half a minute."""
    from moto.s3.models import s3_backends

    backend = next(iter(s3_backends.values()))["aws"]
    for key in keys:
        backend.put_object(bucket, key, b"")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    """Pieces so short that small files have many."""
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)
    monkeypatch.setattr("prism_job.storage.transfers.PIECE_BYTES", 2**14)
    return 2**14


@pytest.mark.parametrize("seed", [1, 2])
def test_a_fifth_of_failed_requests_changes_no_byte_and_each_is_one_retry(
    job: Job, s3: Any, no_pauses: pytest.MonkeyPatch, small_pieces: int, seed: int
) -> None:
    clean = on_s3(job, s3)
    done = [clean.passes(stage) for stage in STAGES]
    assert [words["retries"] for words in done] == [0, 0, 0]
    calm = open_store(done[-1]["manifest"].removesuffix("/manifest.json")).get("selected.parquet")
    no_pauses.setenv("PRISM_CACHE", str(job.folder / "another-node"))
    rough = clean.copy(store="s3://prism/other-gradients", output="s3://prism/other-selections")
    with UnreliableProxy(s3.meta.endpoint_url, 0.2, seed, delay_seconds=0.01) as proxy:
        point_at(proxy.url, no_pauses)
        done = [rough.passes(stage) for stage in STAGES]
        content = open_store(done[-1]["manifest"].removesuffix("/manifest.json")).get("selected.parquet")
    num_retries = sum(words["retries"] for words in done)
    assert content == calm
    # The get above comes after the last stage's termination message.
    assert num_retries <= proxy.num_faults <= num_retries + retries.MAX_TRIES
    assert num_retries > 10


@pytest.mark.parametrize("kind", ["slow_down", "reset_before", "reset_after", "cut"])
def test_every_operation_survives_every_fault(
    s3: Any, no_pauses: pytest.MonkeyPatch, small_pieces: int, tmp_path: Path, kind: str
) -> None:
    content = random.Random(kind).randbytes(10 * small_pieces + 1)
    (tmp_path / "up").write_bytes(content)
    before = retries.num_retries()
    with UnreliableProxy(s3.meta.endpoint_url, 0.4, seed=3, kinds=(kind,)) as proxy:
        point_at(proxy.url, no_pauses)
        store = open_store("s3://prism/x")
        store.put("small", b"some bytes")
        store.put_file("large", tmp_path / "up")
        assert store.get("small") == b"some bytes"
        assert store.get("large") == content
        assert [listed.key for listed in store.list()] == ["large", "small"]
        assert (store.exists("small"), store.exists("none")) == (True, False)
        store.download("large", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == content
    assert retries.num_retries() - before == proxy.num_faults > 5
    # Where the answer that began an upload was lost, that upload stays behind; nobody ever gave it a part.
    for left in s3.list_multipart_uploads(Bucket="prism").get("Uploads", []):
        assert not s3.list_parts(Bucket="prism", Key=left["Key"], UploadId=left["UploadId"]).get("Parts")


def test_an_upload_whose_last_response_was_lost_counts_as_done(
    no_pauses: pytest.MonkeyPatch, small_pieces: int, tmp_path: Path
) -> None:
    from botocore.exceptions import ClientError, ReadTimeoutError

    (tmp_path / "up").write_bytes(b"x" * 3 * small_pieces)
    store, tries = S3Prefix("s3://prism"), []
    honest = store.client.complete_multipart_upload

    def forgetful(**arguments: Any) -> None:
        # Ceph and MinIO know nothing of an upload that became an object; S3 and moto do.
        tries.append(arguments)
        if len(tries) == 1:
            honest(**arguments)
            raise ReadTimeoutError(endpoint_url="here")
        raise ClientError({"Error": {"Code": "NoSuchUpload"}, "ResponseMetadata": {"HTTPStatusCode": 404}}, "Complete")

    no_pauses.setattr(store.client, "complete_multipart_upload", forgetful)
    store.put_file("once", tmp_path / "up")
    assert len(tries) == 2
    assert store.get("once") == b"x" * 3 * small_pieces
    # If the object is not from this upload, the same response is an error.
    with pytest.raises(TransientError, match="NoSuchUpload"):
        store.put_file("once", tmp_path / "up")


def test_a_listing_retries_only_the_page_that_failed(s3: Any, no_pauses: pytest.MonkeyPatch) -> None:
    keys = [f"many/{number:05d}" for number in range(4 * PAGE + 1)]
    fill("prism", keys)
    with UnreliableProxy(s3.meta.endpoint_url, 0.4, seed=2, kinds=("slow_down", "cut", "reset_after")) as proxy:
        point_at(proxy.url, no_pauses)
        assert [listed.key for listed in open_store("s3://prism").list("many/")] == keys
    assert proxy.num_faults > 0
    assert proxy.counts["requests"] == 5 + proxy.num_faults


def test_what_a_store_holds_costs_one_page_for_each_thousand_objects(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    units = [f"{number:032x}" for number in range(2 * PAGE)]
    with_factors = units[:: len(units) // 250]
    keys = [shards.shard_key("digest", "candidates", unit) for unit in units]
    keys += [shards.shard_key("digest", "factors", unit) for unit in with_factors]
    # Neither other extractors nor rows nor runs in the same store are paid for.
    elsewhere = [shards.shard_key("another", "candidates", unit) for unit in units]
    rows = [f"rows/{unit}.jsonl.zst" for unit in units]
    fill("prism", [f"store/{key}" for key in keys + elsewhere + rows])
    with UnreliableProxy(s3.meta.endpoint_url, 0.0, seed=0) as proxy:
        point_at(proxy.url, monkeypatch)
        store = open_store("s3://prism/store")
        present = shards.units_present(store, "digest")
        assert (present["candidates"], present["factors"]) == (set(units), set(with_factors))
        assert len(proxy.paths) == -(-len(keys) // PAGE)
        proxy.paths.clear()
        assert staged_rows.staged_names(store) == set(units)
        assert len(proxy.paths) == len(rows) // PAGE


@pytest.mark.parametrize("algorithm", ["CRC32", "SHA256", "SHA1", "MD5"])
@pytest.mark.parametrize(
    "sizes", [None, [1000, 1000, 500], [700, 1500, 300]], ids=["whole", "equal parts", "odd parts"]
)
def test_a_checksum_matches_only_its_content(
    tmp_path: Path, algorithm: checksums.Algorithm, sizes: list[int] | None
) -> None:
    content = random.Random(1).randbytes(2500)
    path = tmp_path / "file"
    path.write_bytes(content)
    value = plain_sum(algorithm, content)
    if sizes:
        ends = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
        parts = [content[start:end] for start, end in itertools.pairwise(ends)]
        value = plain_sum(algorithm, b"".join(plain_sum(algorithm, part) for part in parts))
    wanted = checksums.Checksum(algorithm, value, len(sizes or []))
    assert checksums.matches(path, wanted, lambda number: (sizes or [])[number - 1])
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not checksums.matches(path, wanted, lambda number: (sizes or [])[number - 1])


def plain_sum(algorithm: str, content: bytes) -> bytes:
    if algorithm == "CRC32":
        return zlib.crc32(content).to_bytes(4, "big")
    return hashlib.new(algorithm.lower(), content).digest()


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ({"ETag": f'"{"0" * 32}"'}, ("MD5", 0)),
        ({"ETag": f'"{"0" * 32}-7"'}, ("MD5", 7)),
        ({"ETag": f'"{"0" * 32}"', "ChecksumCRC32": "AAAAAA=="}, ("CRC32", 0)),
        ({"ETag": f'"{"0" * 32}-7"', "ChecksumCRC32": "AAAAAA==-7"}, ("CRC32", 7)),
        ({"ETag": f'"{"0" * 32}-7"', "ChecksumCRC32": "AAAAAA==", "ChecksumType": "FULL_OBJECT"}, ("CRC32", 0)),
        # Of which bytes it is the sum is not said: the ETag is taken.
        ({"ETag": f'"{"0" * 32}-7"', "ChecksumCRC32": "AAAAAA=="}, ("MD5", 7)),
        ({"ETag": f'"{"0" * 32}"', "ServerSideEncryption": "aws:kms"}, None),
        ({"ETag": f'"{"0" * 32}"', "SSECustomerAlgorithm": "AES256"}, None),
        ({"ETag": '"CJjT4q"'}, None),
    ],
)
def test_only_a_checksum_is_used_as_one(head: dict[str, str], expected: tuple[str, int] | None) -> None:
    checksum = checksums.expected_checksum(head, "bucket")
    assert (checksum and (checksum.algorithm, checksum.num_parts)) == expected


def test_an_interrupted_download_requests_only_the_missing_pieces(tmp_path: Path, small_pieces: int) -> None:
    content = random.Random(2).randbytes(6 * small_pieces + 9)
    asked: list[int] = []

    def give(start: int, length: int, _: object) -> bytes:
        asked.append(start)
        return content[start : start + length]

    def cut_off(start: int, length: int, given_up: Any) -> bytes:
        if start >= 3 * small_pieces:
            while len(index.read_text().splitlines()) < 4:
                time.sleep(0.001)
            raise TransientError("cut off", where="here", fix="again")
        return give(start, length, given_up)

    path, index = tmp_path / "file", tmp_path / "file.part.index"
    for tag in ("first", "second"):  # what was left of another content is of no use
        with pytest.raises(TransientError):
            transfers.resumable_download(path, len(content), tag, cut_off, lambda _: None)
        assert not path.exists()
    noted = {int(line.split()[0]) for line in index.read_text().splitlines()[1:]}
    assert noted == {0, small_pieces, 2 * small_pieces}
    damaged = min(noted)
    with (tmp_path / "file.part").open("r+b") as part:
        part.seek(damaged)
        part.write(b"not what was noted")
    asked.clear()
    transfers.resumable_download(path, len(content), "second", give, lambda _: None)
    assert path.read_bytes() == content
    starts = set(range(0, len(content), small_pieces))
    assert set(asked) == starts - noted | {damaged}
    assert len(asked) == len(set(asked))
    assert list(tmp_path.iterdir()) == [path]
