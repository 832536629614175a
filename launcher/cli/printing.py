"""What `prism` prints: data on stdout in the format asked for, everything else on stderr. Knows no verb."""

import json
import os
import sys
from collections.abc import Iterable
from typing import Any

from launcher.cli.options import Output
from launcher.follow.terminal_text import coloured, printable


def print_note(line: str) -> None:
    """A line for a person, on stderr."""
    print(printable(line), file=sys.stderr, flush=True)


def print_facts(facts: dict[str, Any], output: Output, *, table: str, has_marks: bool = False) -> None:
    """The answer of a verb, on stdout. `table`: the same for a person. `has_marks`: a terminal shows its marks as colour."""
    if output is Output.json:
        try:
            print(json.dumps(facts, ensure_ascii=False))
        except UnicodeEncodeError:  # half of a surrogate pair, for instance in a column's name: escaped
            print(json.dumps(facts))
    elif output is Output.yaml:
        import yaml

        _print(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True), end="")
    else:
        _print(coloured(printable(table)) if has_marks and _has_colour() else printable(table))


def _print(text: str, end: str = "\n") -> None:
    try:
        print(text, end=end)
    except UnicodeEncodeError:  # a terminal that is not UTF-8
        print(text.encode(sys.stdout.encoding, "backslashreplace").decode(sys.stdout.encoding), end=end)


def _has_colour() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def yaml_documents(objects: Iterable[dict[str, Any]]) -> str:
    """Objects as `kubectl apply -f -` reads them; a text of several lines is written as a block."""
    import yaml

    class BlockDumper(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    BlockDumper.add_representer(str, text)
    return yaml.dump_all(objects, Dumper=BlockDumper, sort_keys=False, allow_unicode=True)
