"""Entries with which trainers take an export: LLaMA-Factory's dataset_info.json, and axolotl's `datasets:`. Writes no files.

The keys, and what each trainer does with a row, are those of these commits:

- github.com/hiyouga/LLaMA-Factory at ff6d4d1 (2026-08-18): data/README.md; parser.py, loader.py and converter.py of
  src/llamafactory/data
- github.com/axolotl-ai-cloud/axolotl at 067b021 (2026-07-24): conversation.qmd, inst_tune.qmd and pretraining.qmd of
  docs/dataset-formats; chat_template.py, user_defined.py, alpaca_w_system.py and completion.py of
  src/axolotl/prompt_strategies; src/axolotl/utils/schemas/datasets.py
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import yaml

from prism_job.data.readers import Row

Json = dict[str, Any]

# What a row may hold that not every trainer takes.
TOOL_CALLS = "tool calls"
TURN_KEYS = "turns with weight, reasoning or other keys"
WEIGHTS = "weights of turns"
TURN_ORDER = "turns that are not user and assistant by turns"
KWARGS = "chat_template_kwargs"
SYSTEM = "system prompts"
HISTORY = "histories"


@dataclass(frozen=True)
class Entry:
    """How a trainer takes a layout: the entry's keys, and what it would drop or change without an error."""

    keys: Json
    unfit: frozenset[str] = frozenset()


LLAMA_FACTORY: dict[str, Entry] = {
    # Not `formatting: openai`: it adds "detailed thinking off" to each system prompt.
    "messages": Entry(
        {
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
                "system_tag": "system",
            },
        },
        frozenset({TOOL_CALLS, TURN_KEYS, WEIGHTS, TURN_ORDER, KWARGS}),
    ),
    "conversations": Entry({"formatting": "sharegpt", "columns": {"messages": "conversations"}}),
    "alpaca": Entry(
        {
            "columns": {
                "prompt": "instruction",
                "query": "input",
                "response": "output",
                "system": "system",
                "history": "history",
            }
        }
    ),
    "text": Entry({"columns": {"prompt": "text"}}),
}
"""Layout -> entry. A layout that is not named has no entry: `prompt` and `completion` go through a chat template there."""

AXOLOTL: dict[str, Entry] = {
    "messages": Entry({"type": "chat_template", "field_messages": "messages"}, frozenset({WEIGHTS, KWARGS})),
    "conversations": Entry(
        {
            "type": "chat_template",
            "field_messages": "conversations",
            "message_property_mappings": {"role": "from", "content": "value"},
        },
        frozenset({TOOL_CALLS}),
    ),
    "alpaca": Entry({"type": "alpaca"}, frozenset({SYSTEM, HISTORY})),
    "prompt and completion": Entry(
        {
            "type": {
                "field_instruction": "prompt",
                "field_output": "completion",
                "format": "{instruction}",
                "no_input_format": "{instruction}",
            }
        }
    ),
    "text": Entry({"type": "completion", "field": "text"}),
}
"""Layout -> entry. A prompt and completion of messages has none: chat_template reads one list of turns."""

COMMENTS = {"alpaca": "# axolotl writes Alpaca's own prompt around each row, not the model's chat template.\n"}
"""Layout -> what a reader of axolotl's entry must know."""

LLAMA_FACTORY_ENDINGS = (".jsonl", ".parquet")
"""Of the files that it reads; its loader takes no compressed JSON lines."""

TRAINERS = {"dataset_info.json": "LLaMA-Factory", "axolotl.yaml": "axolotl"}
"""File beside the data -> whose entry it holds. LLaMA-Factory knows no other name."""

FIX = "--format trl, sharegpt or alpaca may fit (docs/export.md)"


class Contents:
    """Layouts of the rows of a file, and what they hold, gathered while they are written."""

    def __init__(self) -> None:
        self.layouts: dict[str, None] = {}
        self.traits: dict[str, None] = {}
        self.has_tools = False

    def seen(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows as they are."""
        for row in rows:
            self.layouts[_layout(row)] = None
            self.traits |= dict.fromkeys(_traits(row))
            self.has_tools |= "tools" in row
            yield row


@dataclass(frozen=True)
class Place:
    """Where trainers find the file: beside the entry's file, or in a data set of the hub."""

    uri: str
    repo: str | None = None

    @property
    def file_name(self) -> str:
        return PurePath(self.uri).name

    @property
    def title(self) -> str:
        """The data set's name in a trainer's configuration. LLaMA-Factory splits lists of them at commas."""
        name = self.repo.rpartition("/")[2] if self.repo else re.sub(r"\.(jsonl(\.\w+)?|parquet)$", "", self.file_name)
        return re.sub(r"[^\w.-]+", "_", name)


def entries_of(place: Place, contents: Contents) -> tuple[dict[str, str], list[str]]:
    """File name -> text, for each trainer that takes the data file; and a note on each that does not."""
    is_compressed = not place.repo and not place.uri.endswith(LLAMA_FACTORY_ENDINGS)
    refusals = {
        "LLaMA-Factory": "it reads .jsonl and .parquet" if is_compressed else _refusal(LLAMA_FACTORY, contents),
        "axolotl": _refusal(AXOLOTL, contents),
    }
    texts = {"LLaMA-Factory": _dataset_info, "axolotl": _axolotl}
    files = {name: texts[trainer](place, contents) for name, trainer in TRAINERS.items() if refusals[trainer] is None}
    return files, [f"no entry for {trainer}: {refusal}" for trainer, refusal in refusals.items() if refusal]


def in_a_line(text: str) -> str:
    """An entry's text as JSON in one line, which YAML takes too."""
    return json.dumps(yaml.safe_load(text), ensure_ascii=False)


def _dataset_info(place: Place, contents: Contents) -> str:
    keys = LLAMA_FACTORY[next(iter(contents.layouts))].keys
    if contents.has_tools:
        keys = keys | {"columns": keys["columns"] | {"tools": "tools"}}
    source = {"hf_hub_url": place.repo} if place.repo else {"file_name": place.file_name}
    return json.dumps({place.title: source | keys}, indent=2, ensure_ascii=False) + "\n"


def _axolotl(place: Place, contents: Contents) -> str:
    layout = next(iter(contents.layouts))
    if place.repo:
        source = {"path": place.repo, "split": "train"}
    else:
        source = {"path": place.uri, "ds_type": "parquet" if place.uri.endswith(".parquet") else "json"}
    entry = source | AXOLOTL[layout].keys
    return COMMENTS.get(layout, "") + yaml.safe_dump(
        {"datasets": [entry]}, sort_keys=False, allow_unicode=True, width=1000
    )


def _refusal(entries: dict[str, Entry], contents: Contents) -> str | None:
    if len(contents.layouts) != 1:
        return f"several layouts: {', '.join(contents.layouts)}" if contents.layouts else "no rows"
    (layout,) = contents.layouts
    if layout not in entries:
        return f"rows of {layout}; {FIX}"
    unfit = [trait for trait in contents.traits if trait in entries[layout].unfit]
    return f"{', '.join(unfit)} in rows of {layout}; {FIX}" if unfit else None


def _layout(row: Row) -> str:
    for column in ("messages", "conversations"):
        if isinstance(row.get(column), list):
            return column
    if "instruction" in row:
        return "alpaca"
    if "prompt" in row:
        return "prompt and completion" + (" of messages" if isinstance(row["prompt"], list) else "")
    return "text"


def _traits(row: Row) -> Iterator[str]:
    turns = row.get("messages") or row.get("conversations") or []
    roles = [turn.get("role", turn.get("from")) for turn in turns]
    if {"tool", "function_call", "observation"} & set(roles) or any("tool_calls" in turn for turn in turns):
        yield TOOL_CALLS
    if any("weight" in turn for turn in turns):
        yield WEIGHTS
    if any(turn.keys() - {"role", "content", "from", "value", "tool_calls", "weight"} for turn in turns):
        yield TURN_KEYS
    if "messages" in row:
        asked = roles[1:] if roles[0] == "system" else roles
        if asked != ["user", "assistant"] * max(1, len(asked) // 2):
            yield TURN_ORDER
    for column, trait in (("chat_template_kwargs", KWARGS), ("system", SYSTEM), ("history", HISTORY)):
        if row.get(column):
            yield trait
