"""Reads a published selection back and checks its files against the manifest."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from prism_job.errors import DataError, RequestError
from prism_job.plan.plan import Plan
from prism_job.publish.manifest import FileDigest, FileName, Manifest
from prism_job.storage.address import open_store, split_uri
from prism_job.storage.objects import Store


@dataclass(frozen=True)
class Published:
    """A published selection: its manifest, and its folder, whose files are checked as they are read."""

    uri: str
    manifest: Manifest
    folder: Store

    def read(self, name: FileName) -> bytes:
        """A file beside the manifest. Raises DataError: it is missing, or its checksum is not the manifest's."""
        content = self.folder.get(name)
        self._check_digest(name, digest_of(content))
        return content

    def _check_digest(self, name: FileName, found: FileDigest) -> None:
        expected = self.manifest.files.get(name)
        if expected is None or found.sha256 != expected.sha256:
            raise DataError(
                f"checksum mismatch: {name} is not the file that the manifest beside it describes",
                where=self.folder.uri(name),
                fix="a published selection is never overwritten: remove that folder, or choose another spec.output",
            )

    def table(self, name: FileName, columns: list[str] | None = None) -> pa.Table:
        """These columns of a table; None: all."""
        with self.as_file(name) as path:
            return pq.ParquetFile(path).read(columns)

    def plan(self) -> Plan:
        return Plan.model_validate_json(self.read("plan.json"))

    def check(self) -> Self:
        """Itself, after reading every file that the manifest names; none of them is held in memory."""
        for name in self.manifest.files:
            with self.as_file(name):
                pass
        return self

    @contextmanager
    def as_file(self, name: FileName) -> Iterator[Path]:
        """A path to read a checked file at, without holding it in memory. Raises DataError as `read`."""
        with self.folder.as_file(name) as path:
            self._check_digest(name, digest_of(path))
            yield path


def find_published(output: Store, folder: str) -> Published | None:
    """A selection already published whole, or None. Raises DataError: a manifest is there and something is damaged."""
    key = f"{folder}/manifest.json"
    return load(output.uri(key)).check() if output.exists(key) else None


def load(manifest_uri: str) -> Published:
    """The selection of a manifest; its files are not read yet.

    Raises:
        RequestError: there is no manifest.
        DataError: it is damaged, or of another format.
    """
    parent, name = split_uri(manifest_uri)
    folder = open_store(parent)
    if name != "manifest.json" or not folder.exists(name):
        fix = "give the path that `prism run` printed last; it ends in /manifest.json"
        raise RequestError("no manifest there", where=manifest_uri, fix=fix)
    try:
        return Published(manifest_uri, Manifest.model_validate_json(folder.get(name)), folder)
    except ValueError as error:
        what = f"damaged manifest, or one of another version: {' '.join(str(error).split())[:300]}"
        raise DataError(what, where=manifest_uri, fix="remove its folder and run the selection again") from error


def digest_of(content: bytes | Path) -> FileDigest:
    """Of these bytes, or of the file at this path."""
    if isinstance(content, bytes):
        return FileDigest(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    with content.open("rb") as file:
        return FileDigest(sha256=hashlib.file_digest(file, "sha256").hexdigest(), bytes=content.stat().st_size)
