"""The reference of all fields of a document: `python -m launcher.resource.field_reference > docs/selection.md`.

A test compares the file with what this prints.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from prism_job.spec.document import SelectionRun

SMALLEST = """\
apiVersion: prism.dev/v1alpha1
kind: SelectionRun
metadata: {name: first}
spec:
  model: {uri: HuggingFaceTB/SmolLM2-135M-Instruct}
  candidates: {uris: [pool.jsonl]}
  targets: {uris: [wanted.jsonl]}
  store: ./store
  output: ./selections
  selection: {keep: highest, budget: {fraction: 0.05}}
"""
"""A document without any field that has a default."""

OPENING = f"""\
<!-- Written by `python -m launcher.resource.field_reference > docs/selection.md`. Change prism_job/spec, not this file. -->

# The document `selection.yaml`

The same document is the input of `prism run` on this machine and of `prism submit`, and a Kubernetes object for
`kubectl apply` where the custom resource is installed. Names are camelCase. For an unknown field the error suggests
the nearest known one; all errors are reported at once, before anything starts (exit code 3). A run publishes its
document with all defaults written out (`spec.yaml` beside the manifest): running that file repeats the run.

The smallest document:

```yaml
{SMALLEST}```

Paths are paths of this machine; a relative one starts from the working directory. `s3://bucket/prefix` can stand in
place of any path. Data may also be `hf://datasets/ORG/NAME` or the manifest of another run (docs/sources.md). On a
cluster every other address is `s3://`, or an absolute path that `podOverlay` mounts, and a name has at most 40
characters.
"""


def markdown() -> str:
    """The whole page."""
    schema = SelectionRun.model_json_schema(by_alias=True)
    parts = [OPENING]
    for path, section in _sections("", schema, schema["$defs"]):
        title = f"`{path}`" if path else "Top level"
        rows = [_row(path, name, field, section) for name, field in section["properties"].items()]
        parts.append(
            f"## {title}\n\n{section['description']}\n\n"
            "| field | type | default | meaning |\n|---|---|---|---|\n" + "".join(rows)
        )
    return "\n".join(parts)


def _sections(path: str, section: dict[str, Any], known: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, section
    for name, field in section["properties"].items():
        if reference := _reference(field):
            yield from _sections(f"{path}.{name}".lstrip("."), known[reference], known)
        elif reference := next(filter(None, (_reference(option.get("items", {})) for option in _options(field))), None):
            yield from _sections(f"{path}.{name}[]", known[reference], known)


def _reference(field: dict[str, Any]) -> str | None:
    return next((str(option["$ref"]).rpartition("/")[2] for option in _options(field) if "$ref" in option), None)


def _options(field: dict[str, Any]) -> list[dict[str, Any]]:
    return [field, *field.get("anyOf", [])]


def _row(path: str, name: str, field: dict[str, Any], section: dict[str, Any]) -> str:
    if name in section.get("required", []):
        default = "required"
    elif _reference(field):
        default = "none" if field["default"] is None else "its defaults"
    else:
        default = "none" if field["default"] is None else _code(field["default"])
    cells = [f"`{name}`", _type(path, name, field), default, field["description"].replace("<", "\\<")]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _type(path: str, name: str, field: dict[str, Any]) -> str:
    """The type of a field, with its bounds."""
    if _reference(field):
        inner = f"{path}.{name}".lstrip(".")
        return f"[section](#{re.sub('[^a-z0-9]', '', inner.lower())})"
    if "anyOf" in field:
        return " or ".join(_type(path, name, option) for option in field["anyOf"] if option.get("type") != "null")
    if "const" in field:
        return _code(field["const"])
    if "enum" in field:
        return " or ".join(_code(value) for value in field["enum"])
    if field["type"] == "array":
        each = _type(path, f"{name}[]", field["items"])
        return f"list of {field.get('minItems', 0)} to {field['maxItems']}, each {each}"
    if field["type"] == "object":
        inner = field["additionalProperties"]
        return "map" if inner is True else f"map of {_type(path, name, inner)}"
    if field["type"] == "string":
        pattern = f" matching {_code(field['pattern'])}" if "pattern" in field else ""
        length = f", {field.get('minLength', 0)} to {field['maxLength']:,} characters" if "maxLength" in field else ""
        return f"text{pattern}{length}"
    return {"integer": "whole number", "number": "number", "boolean": "true or false"}[field["type"]] + _bounds(field)


def _bounds(field: dict[str, Any]) -> str:
    signs = {"exclusiveMinimum": "> ", "minimum": "≥ ", "exclusiveMaximum": "< ", "maximum": "≤ "}
    return "".join(f", {sign}{_number(field[key])}" for key, sign in signs.items() if key in field)


def _number(value: float) -> str:
    if isinstance(value, int) and value > 2**16 and value.bit_count() == 1:
        return f"2^{value.bit_length() - 1}"
    return f"{value:,}"


def _code(value: Any) -> str:
    return f"`{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}`"


if __name__ == "__main__":
    print(markdown(), end="")
