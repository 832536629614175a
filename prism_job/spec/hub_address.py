"""Addresses of data sets on the Hugging Face hub: `hf://datasets/ORG/NAME[@REV][/PATH][?config=…&split=…]`. Asks no server."""

import re
from dataclasses import dataclass, replace
from typing import Self
from urllib.parse import parse_qsl, urlencode

PREFIX = "hf://datasets/"

_FORM = re.compile(
    r"hf://datasets/(?P<repo>[\w.-]+(/[\w.-]+)?)"
    r"(@(?P<revision>refs/(convert|pr)/[\w.-]+|[^\s/@?]+))?(/(?P<path>[^?\x00-\x1f\x7f]*))?(\?(?P<query>[^?]*))?"
)


@dataclass(frozen=True)
class HubAddress:
    """A data set on the hub; of it one split of one config, or the data files at `path`."""

    repo: str
    revision: str | None = None
    path: str = ""
    config: str | None = None
    split: str | None = None

    @classmethod
    def parse(cls, uri: str) -> Self:
        """Raises ValueError: not of this form."""
        form = _FORM.fullmatch(uri)
        if form is None:
            raise ValueError("write a data set of the hub as hf://datasets/ORG/NAME[@REVISION][?config=…&split=…]")
        query = parse_qsl(form["query"] or "", keep_blank_values=True)
        chosen = dict(query)
        if len(chosen) != len(query) or not set(chosen) <= {"config", "split"} or not all(chosen.values()):
            raise ValueError("after '?' stand config=NAME and split=NAME, each at most once")
        path = (form["path"] or "").strip("/")
        if path and chosen:
            raise ValueError("give a path within the data set, or its config and split, not both")
        return cls(form["repo"], form["revision"], path, chosen.get("config"), chosen.get("split"))

    def __str__(self) -> str:
        chosen = {key: value for key, value in (("config", self.config), ("split", self.split)) if value}
        revision = f"@{self.revision}" if self.revision else ""
        path = f"/{self.path}" if self.path else ""
        return f"{PREFIX}{self.repo}{revision}{path}{'?' + urlencode(chosen) if chosen else ''}"

    def at(self, commit: str) -> Self:
        """The same at this commit."""
        return replace(self, revision=commit)


def is_hub(uri: str) -> bool:
    return uri.startswith("hf://")
