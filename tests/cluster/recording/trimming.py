"""What differs from server to server, or from try to try, gives way to a placeholder; the same to the same."""

from __future__ import annotations

import re
from typing import Any

from tests.cluster.recording.session import Object

UID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
TIMES = {"creationTimestamp", "deletionTimestamp", "lastTransitionTime", "expirationTimestamp"}
"""Fields that the server's clock fills. Other times are ours, and compared as they are."""
BUILD = {"gitCommit", "gitTreeState", "buildDate", "goVersion", "compiler", "platform"}
"""Of /version: how the binary was built."""
LONGEST_TEXT = 400


def trimmed(exchanges: list[Object]) -> list[Object]:
    """managedFields go; uids, versions, times and continue tokens become placeholders; a dump of an object is cut."""
    uids: dict[str, str] = {}
    versions: dict[str, str] = {}

    def text_of(text: str) -> str:
        text = re.sub(r"RBAC: \[?clusterrole.*not found\]?", "RBAC: <the roles that are not read yet> not found", text)
        text = text.splitlines()[-1] if text.startswith("[+]") else text  # what of /readyz is not ready
        text = UID.sub(lambda match: uids.setdefault(match[0], f"<uid {len(uids) + 1}>"), text)
        text = re.sub(r"(too old resource version: \d+) \(\d+\)", r"\1 (<newest version>)", text)
        text = re.sub(r"continue=[^&]{20,}", "continue=<token>", text)
        text = re.sub(r"resourceVersion=\d\d+", "resourceVersion=<version>", text)
        text = re.sub(r"(?<= at )\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "<time>", text)
        text = re.sub(r"(cannot be handled as a \w+: )(json: cannot unmarshal|parsing time).*", r"\1<Go's words>", text)
        if len(text) > LONGEST_TEXT:
            text = re.sub(
                r"Invalid value: \S*\{.*\}(?=: )", "Invalid value: <cut: the whole object>", text, flags=re.DOTALL
            )
        return text if len(text) <= 10 * LONGEST_TEXT else f"{text[:100]}<cut: {len(text)} characters>"

    def walk(value: Any, name: str = "", *, of_list: bool = False) -> Any:
        if isinstance(value, list):
            return [walk(item, name) for item in value]
        if isinstance(value, str):
            if name in TIMES:
                return "<time>"
            if name == "continue" and value:
                return "<token>"
            if name == "resourceVersion" and value not in ("", "0", "1"):
                return "<newest version>" if of_list else versions.setdefault(value, f"<version {len(versions) + 1}>")
            return text_of(value)
        if name == "tolerationSeconds":
            return "<seconds>"  # of a pod that sets none: a setting of the server
        if not isinstance(value, dict):
            return value
        kind = str(value.get("kind", ""))
        listed = kind.endswith("List") or of_list or value.get("type") == "BOOKMARK"
        out = {}
        for key in sorted(value):
            if key in ("managedFields", "storageVersionHash") or (key in BUILD and "gitVersion" in value):
                continue
            goes_on = listed and key in ("metadata", "resourceVersion", "object")
            out[key] = walk(value[key], key, of_list=goes_on)
        return out

    return [walk(exchange) for exchange in exchanges]
