"""Objects under a prefix: an S3 bucket (boto3) or a local folder, with the same five verbs. Not: what the bytes mean.

Both make a put atomic: a reader sees the whole object or none. Their errors are translated here and nowhere else.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from prism_job.errors import DataError, PrismError, RequestError, TryAgain

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


@dataclass(frozen=True)
class Listed:
    """One object of a listing: its key below the prefix, its size, and what changes when its content does.

    Attributes:
        modified: when it was put, in seconds since 1970 by the clock of whoever keeps it.
    """

    key: str
    size_bytes: int
    tag: str
    modified: float


class Store(Protocol):
    """The five verbs, and how an object is called in messages."""

    def uri(self, key: str) -> str: ...

    def get(self, key: str) -> bytes:
        """Whole content. Raises DataError where there is no such object."""

    def download(self, key: str, path: Path) -> None:
        """Whole content into a file, without holding it in memory."""

    def as_file(self, key: str) -> AbstractContextManager[Path]:
        """A path to read the content at: its own where it lies on this machine, else of a copy that is gone afterwards."""

    def put(self, key: str, content: bytes) -> None:
        """Atomic: visible whole or not at all."""

    def put_file(self, key: str, path: Path) -> None:
        """As put, from a file, without holding it in memory."""

    def list(self, prefix: str = "") -> Iterator[Listed]:
        """All objects whose key begins with `prefix`, in key order."""

    def exists(self, key: str) -> bool: ...

    def delete(self, keys: Sequence[str]) -> None:
        """Remove these objects; one that is gone already is no error."""


def open_store(uri: str) -> Store:
    """The store at a path or at `s3://bucket/prefix`. Nothing is asked of it yet."""
    return S3Prefix(uri) if uri.startswith("s3://") else LocalFolder(uri)


def split_uri(uri: str) -> tuple[str, str]:
    """Parent and last name: `s3://b/x/y.jsonl` -> (`s3://b/x`, `y.jsonl`)."""
    parent, _, name = uri.rstrip("/").rpartition("/")
    return parent or ("/" if uri.startswith("/") else "."), name


MAX_DELETED_AT_ONCE = 1000
"""Keys that S3 takes in one request to delete."""

_UMASK = os.umask(0)
os.umask(_UMASK)
# mkstemp makes files that only their owner may read; a shared store needs what the umask allows.


class LocalFolder:
    """A folder. Put writes beside, syncs, renames."""

    def __init__(self, uri: str) -> None:
        self.root = Path(uri)

    def uri(self, key: str) -> str:
        return str(self.root / key)

    def get(self, key: str) -> bytes:
        with _local_errors(self.uri(key)):
            return (self.root / key).read_bytes()

    def download(self, key: str, path: Path) -> None:
        with _local_errors(self.uri(key)):
            shutil.copyfile(self.root / key, path)

    @contextlib.contextmanager
    def as_file(self, key: str) -> Iterator[Path]:
        with _local_errors(self.uri(key)):
            yield self.root / key

    def put(self, key: str, content: bytes) -> None:
        self._commit(key, io.BytesIO(content))

    def put_file(self, key: str, path: Path) -> None:
        with path.open("rb") as source:
            self._commit(key, source)

    def _commit(self, key: str, source: IO[bytes]) -> None:
        target = self.root / key
        with _local_errors(self.uri(key), writing=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, beside = tempfile.mkstemp(dir=target.parent, prefix=".put-")
            try:
                with os.fdopen(handle, "wb") as file:
                    shutil.copyfileobj(source, file, 2**20)
                    file.flush()
                    os.fsync(file.fileno())
                Path(beside).chmod(0o666 & ~_UMASK)
                os.replace(beside, target)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(beside)
                raise
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def list(self, prefix: str = "") -> Iterator[Listed]:
        # Only the folder part of the prefix is walked: a listing of one extractor must not stat all the others.
        start = self.root / prefix.rpartition("/")[0]
        with _local_errors(str(start)):
            found = []
            walked: set[str] = set()
            for folder, folders, names in os.walk(start, onerror=_not_in_silence, followlinks=True):
                folders.sort()
                if os.path.realpath(folder) in walked:  # a link back to where we came from
                    folders.clear()
                    continue
                walked.add(os.path.realpath(folder))
                for name in names:
                    key = (Path(folder) / name).relative_to(self.root).as_posix()
                    if key.startswith(prefix) and not name.startswith(".put-"):
                        found.append(key)
        for key in sorted(found):
            with _local_errors(self.uri(key)):
                stat = (self.root / key).stat()
            yield Listed(key, stat.st_size, str(stat.st_mtime_ns), stat.st_mtime)

    def exists(self, key: str) -> bool:
        return (self.root / key).exists()

    def delete(self, keys: Sequence[str]) -> None:
        # Folders stay: a put that has just made sure of its folder must find it.
        for key in keys:
            with _local_errors(self.uri(key)):
                (self.root / key).unlink(missing_ok=True)


def _not_in_silence(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # a folder that is not there yet holds nothing
        raise error


_BAD_WEATHER = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.EBUSY}


@contextlib.contextmanager
def _local_errors(where: str, *, writing: bool = False) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        if writing:
            fix = "choose a folder that can be made and written"
            raise RequestError("cannot be written: no such folder", where=where, fix=fix) from error
        fix = "check the path, and whether it was deleted while the run went on; a link may lead nowhere"
        raise DataError("no such file", where=where, fix=fix) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "free some space or choose another folder, then run again: finished units are kept"
            raise TryAgain("no space left on the device", where=where, fix=fix) from error
        if error.errno in _BAD_WEATHER:
            fix = "look at the disk or network mount, then run again: finished units are kept"
            raise TryAgain(f"cannot be read or written now: {error.strerror}", where=where, fix=fix) from error
        raise RequestError(
            f"cannot be read or written: {error.strerror}", where=where, fix="check the path and its permissions"
        ) from error


class S3Prefix:
    """A prefix of a bucket. One client a process; retries, timeouts and checksums are set on purpose."""

    def __init__(self, uri: str) -> None:
        self.bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        self.prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self.client = _client()

    def uri(self, key: str) -> str:
        return f"s3://{self.bucket}/{self.prefix}{key}"

    def get(self, key: str) -> bytes:
        with _s3_errors(self.uri(key)):
            response = self.client.get_object(Bucket=self.bucket, Key=self.prefix + key, ChecksumMode="ENABLED")
            return response["Body"].read()

    def download(self, key: str, path: Path) -> None:
        with _s3_errors(self.uri(key)), _local_errors(str(path)):
            self.client.download_file(self.bucket, self.prefix + key, str(path))

    @contextlib.contextmanager
    def as_file(self, key: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="prism-") as folder:
            path = Path(folder) / "object"
            self.download(key, path)
            with _local_errors(str(path)):
                yield path

    def put(self, key: str, content: bytes) -> None:
        with _s3_errors(self.uri(key)):
            self.client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=content, ChecksumAlgorithm="CRC32")

    def put_file(self, key: str, path: Path) -> None:
        with _s3_errors(self.uri(key)):
            self.client.upload_file(str(path), self.bucket, self.prefix + key, ExtraArgs={"ChecksumAlgorithm": "CRC32"})

    def list(self, prefix: str = "") -> Iterator[Listed]:
        with _s3_errors(self.uri(prefix)):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self.prefix + prefix
            )
            for page in pages:
                for entry in page.get("Contents", []):
                    yield Listed(
                        entry["Key"][len(self.prefix) :],
                        entry["Size"],
                        entry["ETag"].strip('"'),
                        entry["LastModified"].timestamp(),
                    )

    def exists(self, key: str) -> bool:
        from botocore.exceptions import ClientError

        with _s3_errors(self.uri(key)):
            try:
                self.client.head_object(Bucket=self.bucket, Key=self.prefix + key)
            except ClientError as error:
                if error.response["Error"]["Code"] in ("404", "NoSuchKey", "NotFound"):
                    return False
                raise
            return True

    def delete(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), MAX_DELETED_AT_ONCE):
            batch = keys[start : start + MAX_DELETED_AT_ONCE]
            with _s3_errors(self.uri("")):
                response = self.client.delete_objects(
                    Bucket=self.bucket,
                    Delete={"Objects": [{"Key": self.prefix + key} for key in batch], "Quiet": True},
                )
            # The request as a whole succeeds; what became of each object stands in the answer.
            for refused in response.get("Errors", []):
                raise _translate({"Error": refused}, f"s3://{self.bucket}/{refused.get('Key', self.prefix)}")


@functools.cache
def _client() -> S3Client:
    import boto3.session
    from botocore.config import Config

    # Eight tries with botocore's jittered exponential backoff span about 45 s of SlowDown, but only 2 s of refused
    # connections (measured, botocore 1.44.5); a dead peer is given up after 10 s of connecting or 60 s of silence.
    # Checksums both ways, also where the server would not ask for them.
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 8},
        connect_timeout=10,
        read_timeout=60,
        tcp_keepalive=True,
        max_pool_connections=16,
        request_checksum_calculation="when_supported",
        response_checksum_validation="when_supported",
    )
    return boto3.session.Session().client("s3", config=config)


_DENIED = {"AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "AllAccessDisabled"}


@contextlib.contextmanager
def _s3_errors(where: str) -> Iterator[None]:
    import botocore.exceptions as boto
    from boto3.exceptions import Boto3Error

    try:
        yield
    except boto.ClientError as error:
        raise _translate(error.response, where) from error
    except (boto.NoCredentialsError, boto.PartialCredentialsError) as error:
        fix = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or a service account with a role"
        raise RequestError(f"no S3 credentials: {error}", where=where, fix=fix) from error
    except (boto.ParamValidationError, boto.NoRegionError) as error:
        fix = "check the bucket's name; set AWS_REGION"
        raise RequestError(f"S3 refused the request before it was sent: {error}", where=where, fix=fix) from error
    except (boto.IncompleteReadError, boto.ResponseStreamingError, boto.FlexibleChecksumError) as error:
        fix = "run again: finished units are kept; if it stays so, look at the object and at proxies on the way"
        raise TryAgain(f"S3's answer broke off or was changed on the way: {error}", where=where, fix=fix) from error
    except (boto.BotoCoreError, Boto3Error) as error:
        hidden = error.__context__  # an upload's error hides the server's answer
        if isinstance(hidden, boto.ClientError):
            raise _translate(hidden.response, where) from error
        fix = "check AWS_ENDPOINT_URL and the network, then run again: finished units are kept"
        raise TryAgain(f"S3 did not answer after 8 tries: {error}", where=where, fix=fix) from error


def _translate(response: Any, where: str) -> PrismError:
    code = str(response.get("Error", {}).get("Code", "?"))
    message = response.get("Error", {}).get("Message", "")
    if code == "NoSuchBucket":
        return RequestError("no such bucket", where=where, fix="create the bucket, or correct its name in the document")
    if code in ("NoSuchKey", "404"):
        return DataError("no such object", where=where, fix="check the key; was it deleted while the run went on?")
    if code in _DENIED:
        fix = "give these credentials s3:GetObject, s3:PutObject and s3:ListBucket there (s3:DeleteObject to prune)"
        return RequestError(f"S3 denies access ({code}): {message}", where=where, fix=fix)
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))
    if 300 <= status < 500 and status not in (408, 409, 429):
        fix = "check bucket, region and endpoint (AWS_REGION, AWS_ENDPOINT_URL): asking again would be answered alike"
        return RequestError(f"S3 refuses the request ({code}): {message}", where=where, fix=fix)
    return TryAgain(f"S3 answered {code}: {message}", where=where, fix="run again later: finished units are kept")
