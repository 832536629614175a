"""Columns of rows and their JSON types, merged over all rows. Does not know files or metadata formats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from prism_job.data.readers import Row

MAX_KEYS = 1000
"""Keys of one object that are told apart: an object may be a dictionary with keys of its own in each row."""

MAX_DEPTH = 32
"""Levels of a value that are told apart."""

MAX_SHOWN = 8
"""Keys of one object that a text lists."""


@dataclass
class FieldType:
    """The types of the values seen in one place. A value may be of several: then more than one part is not empty."""

    scalars: set[str] = field(default_factory=set)  # of text, integer, number, boolean
    keys: dict[str, FieldType] = field(default_factory=dict)  # of objects
    items: FieldType | None = None  # of lists

    def add(self, value: Any, depth: int = 0) -> None:
        if isinstance(value, (dict, list)) and depth == MAX_DEPTH:
            self.scalars.add("more levels")
        elif isinstance(value, dict):
            for key, item in value.items():
                if key in self.keys or len(self.keys) < MAX_KEYS:
                    self.keys.setdefault(key, FieldType()).add(item, depth + 1)
        elif isinstance(value, list):
            self.items = self.items or FieldType()
            for item in value:
                self.items.add(item, depth + 1)
        elif value is not None:
            self.scalars.add(_SCALARS[type(value)])

    @property
    def is_known(self) -> bool:
        """Whether any value but null was seen."""
        return bool(self.scalars or self.keys or self.items)

    @property
    def scalar(self) -> str | None:
        """The type, where all values have one: integers beside other numbers are numbers."""
        if self.keys or self.items:
            return None
        names = {"number"} if self.scalars == {"integer", "number"} else self.scalars
        return next(iter(names)) if len(names) == 1 else None

    def __str__(self) -> str:
        keys = [f"{key}: {kind}" for key, kind in list(self.keys.items())[:MAX_SHOWN]]
        keys += ["…"] if len(self.keys) > MAX_SHOWN else []
        objects = f"{{{', '.join(keys)}}}" if keys else ""
        lists = "" if self.items is None else f"list of {self.items}" if self.items.is_known else "empty list"
        return " or ".join([*sorted(self.scalars), *filter(None, (objects, lists))]) or "null"


_SCALARS = {str: "text", bool: "boolean", int: "integer", float: "number"}


def seen(rows: Iterable[Row], columns: FieldType) -> Iterator[Row]:
    """The rows as they are; each is added to `columns`, whose keys are the columns' names."""
    for row in rows:
        columns.add(row)
        yield row
