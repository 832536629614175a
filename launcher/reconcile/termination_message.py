"""The termination message of a stage's pods: its result, or its error. Pure. An image of another version may write anything."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.reconcile.child_status import terminated_worker
from launcher.resource.object import Object

LARGEST_COUNT = 2**53
"""JSON as others read it has no larger integers."""

MANIFEST_URI = re.compile(r"(s3://|/)[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,2043}")
"""Without control characters: people see it in their terminals."""


GPU_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+/-]{0,63}")
"""It goes into a pod's environment, where `$(NAME)` would be replaced."""


def parse(message: str) -> Object:
    """The JSON object in it; empty where there is none."""
    try:
        content = json.loads(message)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def result_of(pods: Sequence[Object]) -> Object:
    """The result of the pods that exited 0. Counts of several nodes add up."""
    result: Object = {}
    for pod in pods:
        ended = terminated_worker(pod)
        if ended is None or ended["exitCode"] != 0:
            continue
        for name, value in parse(ended.get("message", "")).items():
            is_count = isinstance(value, int) and not isinstance(value, bool)
            result[name] = result.get(name, 0) + value if is_count else value
    return result


def error_of(message: str) -> str:
    """The error that a pod reported; the last line of its log where it reported none."""
    content = parse(message)
    if "error" in content:
        return f"{content['error']} ({content.get('where', '')}); {content.get('fix', '')}"
    return (message.strip().splitlines() or [""])[-1]


def count(result: Mapping[str, Any], name: str) -> int | None:
    """A count in a result; None where it is missing or no valid count."""
    value = result.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if 0 <= value < LARGEST_COUNT else None


def gpu_in(result: Mapping[str, Any]) -> str | None:
    """The name of the GPUs in a result; None where it is missing or no plain name."""
    name = result.get("gpu")
    return name if isinstance(name, str) and GPU_NAME.fullmatch(name) else None


def warnings_in(result: Mapping[str, Any]) -> str:
    """What a stage that succeeded warns of, as one text; empty where there is nothing, or no list of texts."""
    found = result.get("warnings")
    if not isinstance(found, list) or not found or not all(isinstance(each, str) for each in found):
        return ""
    return f"warning: {' '.join(found)}"


def is_complete(stage: str, result: Mapping[str, Any]) -> bool:
    """Whether a result has all that the next stage needs."""
    if stage == "plan":
        return all(count(result, name) is not None for name in ("units", "missing", "examples", "pairs", "badRows"))
    return stage != "reduce" or bool(MANIFEST_URI.fullmatch(str(result.get("manifest"))))
