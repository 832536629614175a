"""Addresses: a path or `s3://bucket/prefix` -> the store there."""

from prism_job.storage.folder import LocalFolder
from prism_job.storage.objects import Store
from prism_job.storage.s3 import S3Prefix


def open_store(uri: str) -> Store:
    """The store at a path or at `s3://bucket/prefix`. Sends no request."""
    if uri.startswith("s3://"):
        return S3Prefix(uri)
    return LocalFolder(uri)


def split_uri(uri: str) -> tuple[str, str]:
    """Parent and last name: `s3://b/x/y.jsonl` -> (`s3://b/x`, `y.jsonl`)."""
    parent, _, name = uri.rstrip("/").rpartition("/")
    return parent or ("/" if uri.startswith("/") else "."), name
