"""Times as Kubernetes writes them: RFC 3339, in UTC, to whole seconds."""

import datetime
from typing import Annotated

from pydantic import AfterValidator


def parse_time(text: str) -> datetime.datetime:
    """A time as Kubernetes writes it."""
    return datetime.datetime.fromisoformat(text)


def time_text(time: datetime.datetime) -> str:
    """To whole seconds, in UTC, as Kubernetes writes it."""
    return time.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _check_time(text: str) -> str:
    if parse_time(text).tzinfo is None:
        raise ValueError("a time without its zone")
    return text


Time = Annotated[str, AfterValidator(_check_time)]
"""A time with its zone. A status with anything else there cannot be read."""
