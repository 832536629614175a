"""Objects under a prefix: what an S3 bucket and a local folder both promise. Not: what the bytes mean, how either does it.

Both make a put atomic: a reader sees the whole object or none. Both raise errors of our three families alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


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
    if uri.startswith("s3://"):
        from prism_job.storage.s3 import S3Prefix

        return S3Prefix(uri)
    from prism_job.storage.folder import LocalFolder

    return LocalFolder(uri)


def split_uri(uri: str) -> tuple[str, str]:
    """Parent and last name: `s3://b/x/y.jsonl` -> (`s3://b/x`, `y.jsonl`)."""
    parent, _, name = uri.rstrip("/").rpartition("/")
    return parent or ("/" if uri.startswith("/") else "."), name
