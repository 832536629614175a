"""A store under a prefix of an S3 bucket, by boto3; translates its errors. Does not know how often a request is retried."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from prism_job.errors import DataError, PrismError, RequestError, TransientError
from prism_job.storage import checksums, transfers
from prism_job.storage.folder import local_errors
from prism_job.storage.objects import Listed
from prism_job.storage.retries import with_retries

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, HeadObjectOutputTypeDef

Response = TypeVar("Response")

MAX_DELETED_AT_ONCE = 1000
"""S3's limit of keys in one DeleteObjects request."""


class S3Prefix:
    """A prefix of a bucket. One client per process; each request is retried after transient errors.

    The server checks every put against a CRC32 that is sent along (one per part). A get is checked while it is read, if the
    object has a CRC32, SHA-1 or SHA-256 of the whole. A download is checked as `storage/checksums.py` describes.
    """

    def __init__(self, uri: str) -> None:
        self.bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        self.prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self.client = _client()

    def uri(self, key: str) -> str:
        return f"s3://{self.bucket}/{self.prefix}{key}"

    def local_path(self, key: str) -> Path | None:
        return None

    def _request(self, key: str, send: Callable[[], Response], cancelled: threading.Event | None = None) -> Response:
        def send_once() -> Response:
            with _s3_errors(self.uri(key)):
                return send()

        return with_retries(send_once, cancelled)

    def get(self, key: str) -> bytes:
        def read() -> bytes:
            response = self.client.get_object(Bucket=self.bucket, Key=self.prefix + key, ChecksumMode="ENABLED")
            # Not `with response["Body"] as body`: that yields the raw stream, which checks no checksum.
            with contextlib.closing(response["Body"]) as body:
                return body.read()

        return self._request(key, read)

    def download(self, key: str, path: Path, tag: str | None = None) -> None:
        head = self._request(key, functools.partial(self._head, key))
        tag, size = tag or head["ETag"].strip('"'), head["ContentLength"]
        expected = checksums.expected_checksum(head, self.bucket)

        def check(part: Path) -> None:
            if expected and not checksums.matches(part, expected, part_bytes):
                fix = "run again: it is downloaded again; if it still fails, check the object and proxies in between"
                what = f"downloaded object fails its {expected.algorithm}"
                raise TransientError(what, where=self.uri(key), fix=fix)

        def part_bytes(number: int) -> int:
            return int(self._request(key, functools.partial(self._head, key, PartNumber=number))["ContentLength"])

        with local_errors(str(path)):
            transfers.resumable_download(path, size, tag, functools.partial(self._get_piece, key, tag, size), check)

    def _head(self, key: str, **more: Any) -> HeadObjectOutputTypeDef:
        return self.client.head_object(Bucket=self.bucket, Key=self.prefix + key, ChecksumMode="ENABLED", **more)

    def _get_piece(self, key: str, tag: str, size: int, start: int, length: int, cancelled: threading.Event) -> bytes:
        # No range for a whole object: only then does the response carry a checksum that boto3 verifies.
        byte_range: dict[str, Any] = {"Range": f"bytes={start}-{start + length - 1}"} if length < size else {}

        def read() -> bytes:
            response = self.client.get_object(
                Bucket=self.bucket, Key=self.prefix + key, IfMatch=f'"{tag}"', ChecksumMode="ENABLED", **byte_range
            )
            with contextlib.closing(response["Body"]) as body:
                if response["ContentLength"] != length:
                    fix = "check proxies in between: they must forward Range headers"
                    what = f"S3 returned {response['ContentLength']} bytes, {length} were requested"
                    raise TransientError(what, where=self.uri(key), fix=fix)
                return body.read()

        return self._request(key, read, cancelled)

    @contextlib.contextmanager
    def as_file(self, key: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="prism-") as folder:
            path = Path(folder) / "object"
            self.download(key, path)
            with local_errors(str(path)):
                yield path

    def put(self, key: str, content: bytes) -> None:
        def write() -> None:
            self.client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=content, ChecksumAlgorithm="CRC32")

        self._request(key, write)

    def put_file(self, key: str, path: Path) -> None:
        with local_errors(str(path)):
            if path.stat().st_size <= transfers.PIECE_BYTES:
                self.put(key, path.read_bytes())
            else:
                self._put_parts(key, path)

    def _put_parts(self, key: str, path: Path) -> None:
        token = uuid.uuid4().hex  # identifies this upload once it has become the object
        target: dict[str, Any] = {"Bucket": self.bucket, "Key": self.prefix + key}
        create = functools.partial(
            self.client.create_multipart_upload, **target, ChecksumAlgorithm="CRC32", Metadata={"prism-upload": token}
        )
        target["UploadId"] = self._request(key, create)["UploadId"]

        def put_piece(number: int, content: bytes, cancelled: threading.Event) -> CompletedPartTypeDef:
            put = functools.partial(
                self.client.upload_part, **target, PartNumber=number + 1, Body=content, ChecksumAlgorithm="CRC32"
            )
            answer = self._request(key, put, cancelled)
            part: CompletedPartTypeDef = {"PartNumber": number + 1, "ETag": answer["ETag"]}
            if "ChecksumCRC32" in answer:
                part["ChecksumCRC32"] = answer["ChecksumCRC32"]
            return part

        def complete(parts: Sequence[CompletedPartTypeDef]) -> None:
            from botocore.exceptions import ClientError

            try:
                self.client.complete_multipart_upload(**target, MultipartUpload={"Parts": parts})
            except ClientError as error:
                # An earlier try may have succeeded although its response was lost: then the object is there.
                gone = error.response["Error"]["Code"] in ("NoSuchUpload", "404")
                if not gone or self._head(key)["Metadata"].get("prism-upload") != token:
                    raise

        try:
            parts = transfers.upload(path, put_piece)
            self._request(key, functools.partial(complete, parts))
        except BaseException:
            # One try: parts that stay behind are no object, and a lifecycle rule of the bucket can remove them.
            with contextlib.suppress(Exception):
                self.client.abort_multipart_upload(**target)
            raise

    def list(self, prefix: str = "") -> Iterator[Listed]:
        more: dict[str, Any] = {}
        while True:
            # Page by page, so that a retry repeats a page and not the whole listing.
            get_page = functools.partial(
                self.client.list_objects_v2, Bucket=self.bucket, Prefix=self.prefix + prefix, **more
            )
            page = self._request(prefix, get_page)
            for entry in page.get("Contents", []):
                yield Listed(
                    entry["Key"][len(self.prefix) :],
                    entry["Size"],
                    entry["ETag"].strip('"'),
                    entry["LastModified"].timestamp(),
                )
            if not page.get("NextContinuationToken"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def exists(self, key: str) -> bool:
        def head() -> bool:
            from botocore.exceptions import ClientError

            try:
                self.client.head_object(Bucket=self.bucket, Key=self.prefix + key)
            except ClientError as error:
                if error.response["Error"]["Code"] in ("404", "NoSuchKey", "NotFound"):
                    return False
                raise
            return True

        return self._request(key, head)

    def delete(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), MAX_DELETED_AT_ONCE):
            batch = keys[start : start + MAX_DELETED_AT_ONCE]
            objects: Any = {"Objects": [{"Key": self.prefix + key} for key in batch], "Quiet": True}
            delete = functools.partial(self.client.delete_objects, Bucket=self.bucket, Delete=objects)
            response = self._request("", delete)
            # The request succeeds even if objects were refused; the response lists those.
            for refused in response.get("Errors", []):
                raise _translate({"Error": refused}, f"s3://{self.bucket}/{refused.get('Key', self.prefix)}")


@functools.cache
def _client() -> S3Client:
    import boto3.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    # One try: retries.py does all retries. A dead server costs 10 s to connect or 30 s of silence.
    # Checksums both ways, also where the server does not ask for them.
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},
        connect_timeout=10,
        read_timeout=30,
        tcp_keepalive=True,
        max_pool_connections=16,
        request_checksum_calculation="when_supported",
        response_checksum_validation="when_supported",
    )
    try:
        return boto3.session.Session().client("s3", config=config)
    except (ValueError, BotoCoreError) as error:  # an invalid endpoint, a missing profile
        fix = "check AWS_ENDPOINT_URL, AWS_PROFILE and AWS_REGION"
        raise RequestError(f"S3 cannot be reached with these settings: {error}", where="AWS_*", fix=fix) from error


_TRANSIENT = {
    *("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException"),
    *("RequestLimitExceeded", "BandwidthLimitExceeded"),
    *("BadDigest", "IncompleteBody", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"),
    "NoSuchUpload",
}
"""Codes that come with status 400, 403 or 404, though the same request may succeed the next time."""

_DENIED = {"AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "AllAccessDisabled"}


@contextlib.contextmanager
def _s3_errors(where: str) -> Iterator[None]:
    import botocore.exceptions as boto
    import urllib3.exceptions
    from botocore.parsers import ResponseParserError

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
        fix = "run again: finished units are kept; if it still fails, check the object and proxies in between"
        raise TransientError(
            f"S3's response was cut off or changed on the way: {error}", where=where, fix=fix
        ) from error
    except (boto.BotoCoreError, urllib3.exceptions.HTTPError, ResponseParserError) as error:
        fix = "check AWS_ENDPOINT_URL and the network, then run again: finished units are kept"
        raise TransientError(f"S3 does not answer: {error}", where=where, fix=fix) from error


def _translate(response: Any, where: str) -> PrismError:
    code = str(response.get("Error", {}).get("Code", "?"))
    message = response.get("Error", {}).get("Message", "")
    if code == "NoSuchBucket":
        return RequestError("no such bucket", where=where, fix="create the bucket, or correct its name in the document")
    if code in ("NoSuchKey", "404"):
        return DataError("no such object", where=where, fix="check the key; was it deleted during the run?")
    if code in _DENIED:
        fix = "give these credentials s3:GetObject, s3:PutObject and s3:ListBucket there (s3:DeleteObject to prune)"
        return RequestError(f"S3 denies access ({code}): {message}", where=where, fix=fix)
    if code in ("PreconditionFailed", "412"):
        fix = "run again from the plan once nothing writes there"
        return DataError("the object changed while it was read", where=where, fix=fix)
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))
    if code not in _TRANSIENT and 300 <= status < 500 and status not in (408, 409, 429):
        fix = "check bucket, region and endpoint (AWS_REGION, AWS_ENDPOINT_URL); a retry would fail the same way"
        return RequestError(f"S3 refuses the request ({code}): {message}", where=where, fix=fix)
    return TransientError(f"S3 answered {code}: {message}", where=where, fix="run again later: finished units are kept")
