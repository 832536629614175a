"""What the own rules of built-in kinds refuse, their schemas apart; and names that are no names."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.cluster.server.kinds.resources import Resource
from tests.cluster.server.kinds.schemas import Cause, quantity

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
MAX_DATA_BYTES = 1_048_576


def metadata_errors(resource: Resource, metadata: dict[str, Any]) -> list[Cause]:
    """What is wrong with a name."""
    bad = []
    name = metadata.get("name", "")
    strict = resource.plural in ("namespaces", "services") and not resource.group
    free = resource.group == "rbac.authorization.k8s.io"
    pattern, longest = (LABEL, 63) if strict else (SUBDOMAIN, 253)
    if not free and (not pattern.fullmatch(name) or len(name) > longest):
        kind = "an RFC 1123 label" if strict else "a lowercase RFC 1123 subdomain"
        text = (
            f"Invalid value: {json.dumps(name)}: {kind} must consist of lower case alphanumeric characters, '-' or '.',"
        )
        text += " and must start and end with an alphanumeric character"
        text += f" (e.g. 'example.com', regex used for validation is '{pattern.pattern}')"
        bad.append(Cause("FieldValueInvalid", "metadata.name", text))
    return bad


def builtin_errors(resource: Resource, new: dict[str, Any], old: dict[str, Any] | None) -> list[Cause]:
    """What a built-in kind's own rules have against `new`, its schema apart."""
    plural, spec = resource.plural, new.get("spec", {})
    if plural == "jobs":
        return _job_errors(new) + (_job_changes(spec, old["spec"]) if old else [])
    if plural == "pods":
        return _pod_errors(spec, "spec")
    if plural == "events":
        return _event_errors(new)
    if plural == "configmaps" and sum(len(text.encode()) for text in new.get("data", {}).values()) > MAX_DATA_BYTES:
        return [Cause("FieldValueTooLong", "[]", f"Too long: may not be more than {MAX_DATA_BYTES} bytes")]
    return []


def _event_errors(event: dict[str, Any]) -> list[Cause]:
    bad, about = [], event.get("involvedObject", {}).get("namespace", "")
    if about != event["metadata"]["namespace"] and (about or event["metadata"]["namespace"] != "default"):
        text = f"Invalid value: {json.dumps(about)}: does not match event.namespace"
        bad.append(Cause("FieldValueInvalid", "involvedObject.namespace", text))
    return bad


def _pod_errors(spec: dict[str, Any], where: str) -> list[Cause]:
    bad, volumes = [], {volume.get("name") for volume in spec.get("volumes", [])}
    for kind in ("initContainers", "containers"):
        for place, container in enumerate(spec.get(kind, [])):
            spot = f"{where}.{kind}[{place}]"
            for index, mount in enumerate(container.get("volumeMounts", [])):
                if mount.get("name") not in volumes:
                    text = f"Not found: {json.dumps(mount.get('name'))}"
                    bad.append(Cause("FieldValueNotFound", f"{spot}.volumeMounts[{index}].name", text))
            limits = container.get("resources", {}).get("limits", {})
            for name, amount in container.get("resources", {}).get("requests", {}).items():
                if "/" in name and quantity(amount) != quantity(limits.get(name, 0)):
                    text = f"Invalid value: {json.dumps(amount)}: must be equal to {name} limit of {limits.get(name)}"
                    bad.append(Cause("FieldValueInvalid", f"{spot}.resources.requests", text))
    return bad


def _job_errors(job: dict[str, Any]) -> list[Cause]:
    spec, name, where = job["spec"], job["metadata"]["name"], "spec.template.spec"
    pod = spec["template"].get("spec", {})
    bad = _pod_errors(pod, where)
    indexed = spec["completionMode"] == "Indexed"
    hostname = f"{name}-{max(spec.get('completions', 1) - 1, 0)}" if indexed else name
    if len(hostname) > 63 or (indexed and not LABEL.fullmatch(hostname)):
        text = f"Invalid value: {json.dumps(name)}: will not able to create pod with invalid DNS label: {hostname}"
        bad.append(Cause("FieldValueInvalid", "metadata.name", text))
    if "podFailurePolicy" in spec:
        bad += _failure_policy_errors(spec, pod)
    return bad


def _failure_policy_errors(spec: dict[str, Any], pod: dict[str, Any]) -> list[Cause]:
    bad = []

    def invalid(where: str, text: str, reason: str = "FieldValueInvalid") -> None:
        bad.append(Cause(reason, where, text))

    if pod.get("restartPolicy") != "Never":
        text = (
            f'Invalid value: "{pod.get("restartPolicy")}": only "Never" is supported when podFailurePolicy is specified'
        )
        invalid("spec.template.spec.restartPolicy", text)
    if spec["podReplacementPolicy"] != "Failed":
        text = f'Unsupported value: "{spec["podReplacementPolicy"]}": supported values: "Failed"'
        invalid("spec.podReplacementPolicy", text, "FieldValueNotSupported")
    names = {container.get("name") for kind in ("containers", "initContainers") for container in pod.get(kind, [])}
    rules = spec["podFailurePolicy"].get("rules", [])
    for place, rule in enumerate(rules):
        where = f"spec.podFailurePolicy.rules[{place}]"
        codes = rule.get("onExitCodes")
        if not codes:
            continue
        values, spot = codes.get("values", []), f"{where}.onExitCodes"
        if codes.get("containerName") and codes["containerName"] not in names:
            text = "must be one of the container or initContainer names in the pod template"
            invalid(f"{spot}.containerName", f"Invalid value: {json.dumps(codes['containerName'])}: {text}")
        if codes.get("operator") == "In" and 0 in values:
            invalid(f"{spot}.values[{values.index(0)}]", "Invalid value: 0: must not be 0 for the In operator")
        if values != sorted(values):
            shown = json.dumps(values, separators=(",", ":"))
            invalid(f"{spot}.values", f"Invalid value: {shown}: must be ordered")
    return bad


def _job_changes(new: dict[str, Any], old: dict[str, Any]) -> list[Cause]:
    fixed = ["selector", "template", "podFailurePolicy", "completionMode", "managedBy"]
    fixed += ["completions"]
    if new.get("completionMode") == "Indexed" and new.get("completions") == new.get("parallelism"):
        fixed.remove("completions")
    if old.get("suspend"):
        new, old = ({**part, "template": _unschedulable(part["template"])} for part in (new, old))
    return [
        Cause("FieldValueInvalid", f"spec.{name}", f"Invalid value: {json.dumps(new.get(name))}: field is immutable")
        for name in fixed
        if new.get(name) != old.get(name)
    ]


def _unschedulable(template: dict[str, Any]) -> dict[str, Any]:
    """A template without what may change while its Job is suspended: where its pods go."""
    free = ("nodeSelector", "affinity", "tolerations", "schedulingGates")
    return {"spec": {name: value for name, value in template.get("spec", {}).items() if name not in free}}
