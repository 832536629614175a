"""What every section of the document has in common: frozen, checked, camelCase. Not: which sections there are."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints
from pydantic.alias_generators import to_camel


class Section(BaseModel):
    """Base of all sections: frozen, camelCase in the document, unknown fields refused, defaults checked too."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        validate_by_name=False,
        validate_by_alias=True,
        validate_default=True,
        allow_inf_nan=False,
    )


def check_uri(uri: str) -> str:
    if any(len(part.encode()) > 255 for part in uri.split("/")):
        raise ValueError("a part between two slashes is longer than the 255 bytes that file systems take")
    if uri.startswith("~"):
        raise ValueError("'~' is not expanded; write the whole path")
    scheme, separator, rest = uri.partition("://")
    if separator and scheme != "s3":
        raise ValueError(f"'{scheme}://' is not supported; use s3://bucket/prefix or a path")
    if separator and not rest.strip("/"):
        raise ValueError("an s3:// address needs a bucket")
    return uri


Uri = Annotated[str, StringConstraints(min_length=1, max_length=1024), AfterValidator(check_uri)]
"""A path on this machine or `s3://bucket/prefix`."""
