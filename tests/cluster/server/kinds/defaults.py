"""The defaults that built-in kinds fill in."""

from __future__ import annotations

from typing import Any

from tests.cluster.server.kinds.resources import Resource


def fill_in(resource: Resource, new: dict[str, Any], old: dict[str, Any] | None) -> None:
    """Writes a built-in kind's defaults into `new`, in place; doing it twice changes nothing."""
    plural, spec = resource.plural, new.get("spec", {})
    if plural == "pods":
        _fill_in_pod(spec)
        spec.setdefault("preemptionPolicy", "PreemptLowerPriority")
        spec.setdefault("priority", 0)
        for why in ("not-ready", "unreachable"):
            wanted = {"key": f"node.kubernetes.io/{why}", "operator": "Exists", "effect": "NoExecute"}
            if old is None and not any(one.get("key") == wanted["key"] for one in spec.get("tolerations", ())):
                spec.setdefault("tolerations", []).append({**wanted, "tolerationSeconds": 300})
        spec.setdefault("enableServiceLinks", True)
        spec.setdefault("serviceAccountName", "default")
        spec["serviceAccount"] = spec["serviceAccountName"]
        new.setdefault("status", {}).setdefault("phase", "Pending")
        new["status"].setdefault("qosClass", _quality_of_service(spec))
    elif plural == "jobs":
        _fill_in_job(new, old)
        new.setdefault("status", {})
    elif plural == "cronjobs":
        new.setdefault("status", {})
        job = spec.get("jobTemplate", {})
        job.setdefault("metadata", {})
        job.get("spec", {}).get("template", {}).setdefault("metadata", {})
        for name, value in (("concurrencyPolicy", "Allow"), ("suspend", False), ("successfulJobsHistoryLimit", 3)):
            spec.setdefault(name, value)
        spec.setdefault("failedJobsHistoryLimit", 1)
        _fill_in_pod(spec.get("jobTemplate", {}).get("spec", {}).get("template", {}).get("spec", {}))
    elif plural == "services":
        spec.setdefault("type", "ClusterIP")
        spec.setdefault("sessionAffinity", "None")
        spec.setdefault("clusterIPs", ["None"])  # a headless one: others would be given an address
        spec.setdefault("internalTrafficPolicy", "Cluster")
        spec.setdefault("ipFamilies", ["IPv4"])
        spec.setdefault("ipFamilyPolicy", "SingleStack")
        new.setdefault("status", {"loadBalancer": {}})
    elif plural == "events":
        new.setdefault("eventTime", None)
        new.setdefault("reportingInstance", "")
    elif plural == "secrets":
        new.setdefault("type", "Opaque")
    elif plural == "namespaces":
        new["metadata"].setdefault("labels", {})["kubernetes.io/metadata.name"] = new["metadata"]["name"]
        new.setdefault("spec", {}).setdefault("finalizers", ["kubernetes"])
        new.setdefault("status", {}).setdefault("phase", "Active")
    elif plural == "customresourcedefinitions":
        _fill_in_definition(new)


def _quality_of_service(spec: dict[str, Any]) -> str:
    """BestEffort where nothing is asked for, Guaranteed where all CPU and memory is, else Burstable."""
    parts = [container.get("resources", {}) for container in spec.get("containers", [])]
    if not any(part.get("requests") or part.get("limits") for part in parts):
        return "BestEffort"
    whole = all({"cpu", "memory"} <= part.get("limits", {}).keys() for part in parts)
    return "Guaranteed" if whole and all(part["limits"] == part["requests"] for part in parts) else "Burstable"


def _fill_in_pod(spec: dict[str, Any]) -> None:
    for name, value in (
        ("restartPolicy", "Always"),
        ("dnsPolicy", "ClusterFirst"),
        ("schedulerName", "default-scheduler"),
    ):
        spec.setdefault(name, value)
    spec.setdefault("securityContext", {})
    spec.setdefault("terminationGracePeriodSeconds", 30)
    for container in (*spec.get("initContainers", []), *spec.get("containers", [])):
        image = container.get("image", "")
        latest = image.endswith(":latest") or ":" not in image.rpartition("/")[2]
        container.setdefault("imagePullPolicy", "Always" if latest else "IfNotPresent")
        container.setdefault("terminationMessagePath", "/dev/termination-log")
        container.setdefault("terminationMessagePolicy", "File")
        resources = container.setdefault("resources", {})
        if "limits" in resources:
            resources["requests"] = {**resources["limits"], **resources.get("requests", {})}
        for port in container.get("ports", []):
            port.setdefault("protocol", "TCP")
        for entry in container.get("env", []):
            if reference := entry.get("valueFrom", {}).get("fieldRef"):
                reference.setdefault("apiVersion", "v1")
    for volume in spec.get("volumes", []):
        for source in ("configMap", "secret", "projected", "downwardAPI"):
            if source in volume:
                volume[source].setdefault("defaultMode", 420)


def _fill_in_job(job: dict[str, Any], old: dict[str, Any] | None) -> None:
    spec, metadata = job.setdefault("spec", {}), job["metadata"]
    if "completions" not in spec and "parallelism" not in spec:
        spec["completions"] = 1
    spec.setdefault("manualSelector", False)
    for name, value in (("parallelism", 1), ("backoffLimit", 6), ("completionMode", "NonIndexed"), ("suspend", False)):
        spec.setdefault(name, value)
    spec.setdefault("podReplacementPolicy", "Failed" if "podFailurePolicy" in spec else "TerminatingOrFailed")
    for rule in spec.get("podFailurePolicy", {}).get("rules", []):
        for condition in rule.get("onPodConditions", []):
            condition.setdefault("status", "True")
    template = spec.get("template", {})
    _fill_in_pod(template.get("spec", {}))
    if old is None and not spec.get("manualSelector"):
        uid, name = metadata["uid"], metadata["name"]
        labels = template.setdefault("metadata", {}).setdefault("labels", {})
        for prefix in ("batch.kubernetes.io/", ""):
            labels.setdefault(f"{prefix}controller-uid", uid)
            labels.setdefault(f"{prefix}job-name", name)
        spec.setdefault("selector", {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}})


def _fill_in_definition(definition: dict[str, Any]) -> None:
    spec = definition.get("spec", {})
    names = spec.get("names", {})
    names.setdefault("singular", names.get("kind", "").lower())
    names.setdefault("listKind", names.get("kind", "") + "List")
    spec.setdefault("conversion", {"strategy": "None"})
    stored = [version["name"] for version in spec.get("versions", []) if version.get("storage")]
    nameless = {"plural": "", "kind": ""}
    definition.setdefault("status", {"acceptedNames": nameless, "conditions": None, "storedVersions": stored})


def established(definition: dict[str, Any]) -> dict[str, Any]:
    """A definition as it is once its kind is served."""
    since, names = definition["metadata"]["creationTimestamp"], definition["spec"]["names"]
    conditions = [
        {"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": since}
        for kind, reason, message in (
            ("NamesAccepted", "NoConflicts", "no conflicts found"),
            ("Established", "InitialNamesAccepted", "the initial names have been accepted"),
        )
    ]
    return {**definition, "status": {**definition["status"], "acceptedNames": names, "conditions": conditions}}
