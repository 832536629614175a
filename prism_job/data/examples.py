"""A row of a data file -> the training content it stands for, and its id. Does not know tokens or files.

The door to this room: the layouts are in candidate_layouts.py and target_layouts.py, and docs/data.md lists them.
Columns that a layout does not name are carried along and change nothing: only the content makes the example's id.
"""

from prism_job.data.bad_row import BadRow, UnclearLayout, describe_columns
from prism_job.data.candidate_layouts import read_candidate
from prism_job.data.content import Content, Layout, Row
from prism_job.data.messages import Message
from prism_job.data.target_layouts import read_target
from prism_job.spec.data import ColumnsSpec
from prism_job.spec.digest import digest

__all__ = [
    "BadRow",
    "Content",
    "Layout",
    "Message",
    "UnclearLayout",
    "as_text",
    "candidate_content",
    "describe_columns",
    "example_id",
    "read_candidate",
    "read_target",
    "target_content",
]


def candidate_content(row: Row, columns: ColumnsSpec | None = None) -> Content:
    """The content of a candidate row. Raises as `read_candidate`, which also gives the layout."""
    return read_candidate(row, columns)[0]


def target_content(row: Row, needs_rejected: bool, columns: ColumnsSpec | None = None) -> Content:
    """The content of a target row. Raises as `read_target`, which also gives the layout."""
    return read_target(row, needs_rejected, columns)[0]


def example_id(content: Content) -> str:
    """32 hex digits of the content: the same content in any file is the same example."""
    return digest(content)


def as_text(content: Content, *, labelled: bool = False) -> str:
    """The example as the report prints it; `labelled`: with the name of each part before it."""
    parts = []
    for key in ("messages", "prompt", "completion", "chosen", "rejected", "text"):
        value = content.get(key)
        if value is None:
            continue
        turns = [value] if isinstance(value, str) else [_turn(message) for message in value]
        parts.append((f"{key}: " if labelled else "") + "\n".join(turns))
    return "\n".join(parts)


def _turn(message: Message) -> str:
    return f"{message['role']}: {message.get('content', message.get('tool_calls'))}"
