"""The base of all sections of the document, and the types that several of them share."""

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, ValidationInfo, field_validator
from pydantic.alias_generators import to_camel

from prism_job.spec.hub_address import HubAddress, is_hub


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

    @field_validator("*", mode="before")
    @classmethod
    def _check_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses a number in quotes, as an API server does: a document means the same to both."""
        kinds = _plain_types(cls.model_fields[str(info.field_name)].annotation)
        if kinds & {bool, int, float} and str not in kinds:
            if bool in kinds and not isinstance(value, bool):
                raise ValueError(f"must be true or false, without quotes, not {value!r}")
            if bool not in kinds and isinstance(value, bool | str):
                raise ValueError(f"must be a number, without quotes, not {value!r}")
        return value


def _plain_types(annotation: Any) -> set[Any]:
    """The types of a field: `Annotated[int, …] | Literal["auto"]` has int and str."""
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*(_plain_types(option) for option in get_args(annotation)))
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    return {get_args(annotation)[0]} if get_origin(annotation) is Annotated else {annotation}


def check_uri(uri: str) -> str:
    if any(len(part.encode()) > 255 for part in uri.split("/")):
        raise ValueError("a part between two slashes is longer than the 255 bytes that file systems take")
    if uri.startswith("~"):
        raise ValueError("'~' is not expanded; write the whole path")
    scheme, separator, rest = uri.partition("://")
    if separator and scheme == "hf":
        raise ValueError("hf:// names data sets, for candidates and targets only; a model of the hub is org/name")
    if separator and scheme != "s3":
        raise ValueError(f"'{scheme}://' is not supported; use s3://bucket/prefix or a path")
    if separator and not rest.strip("/"):
        raise ValueError("an s3:// address needs a bucket")
    return uri


def _check_data_uri(uri: str) -> str:
    if is_hub(uri):
        HubAddress.parse(uri)
        return uri
    return check_uri(uri)


Uri = Annotated[str, StringConstraints(min_length=1, max_length=1024), AfterValidator(check_uri)]
"""A path on this machine or `s3://bucket/prefix`."""

DataUri = Annotated[str, StringConstraints(min_length=1, max_length=1024), AfterValidator(_check_data_uri)]
"""A `Uri`, or a data set on the hub: `hf://datasets/ORG/NAME[@REV][?config=…&split=…]`."""

DnsLabel = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
"""A DNS label: lower case letters, digits and '-'."""
