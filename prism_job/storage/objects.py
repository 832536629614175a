"""The protocol of a store: what an S3 prefix and a local folder both do. Does not know what the bytes mean.

Both make a put atomic: a reader sees the whole object or none. Both raise only errors of the three families (errors.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Listed:
    """One object of a listing."""

    key: str  # below the store's address
    size_bytes: int
    tag: str  # changes when the content does: ETag, or modification time
    modified: float  # when it was put: seconds since 1970 by the clock of the server or the file system


class Store(Protocol):
    """Objects by key, below one address."""

    def uri(self, key: str) -> str:
        """The address of an object, for messages."""

    def local_path(self, key: str) -> Path | None:
        """Where the object lies on this machine, or None where it must be downloaded."""

    def get(self, key: str) -> bytes:
        """Whole content. Raises DataError where there is no such object."""

    def download(self, key: str, path: Path, tag: str | None = None) -> None:
        """Whole content into a file, without holding it in memory; with `tag`, only the content listed under that tag."""

    def as_file(self, key: str) -> AbstractContextManager[Path]:
        """A path to read the content at: its own where it lies on this machine, else of a temporary copy."""

    def put(self, key: str, content: bytes) -> None:
        """Atomic: visible whole or not at all."""

    def put_file(self, key: str, path: Path) -> None:
        """As put, from a file, without holding it in memory."""

    def list(self, prefix: str = "") -> Iterator[Listed]:
        """All objects whose key begins with `prefix`, in key order."""

    def exists(self, key: str) -> bool: ...

    def delete(self, keys: Sequence[str]) -> None:
        """Remove these objects; a missing one is no error."""
