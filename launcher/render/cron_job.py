"""A run at set times: a ConfigMap with the document, and a plain CronJob whose pod submits it and waits. Pure: no cluster.

That pod is light (the launcher's image, no torch); what computes are the Jobs of the run. Each time the same document is
submitted again: what its data gained since is extracted, and nothing else. A pod that is lost is replaced, and the next one
attaches to the same run.
"""

from __future__ import annotations

import re
from typing import Any

from launcher.resource.names import API_GROUP
from prism_job.errors import SpecError
from prism_job.spec.document import SelectionRun

Object = dict[str, Any]

CONTAINER = "submit"
FOLDER, DOCUMENT = "/etc/prism", "selection.yaml"

LONGEST_NAME = 52
"""Of a CronJob: 11 more characters make a Job's name, which ends at 63."""

LARGEST_DOCUMENT_BYTES = 900_000
"""A ConfigMap holds 1 MiB, its own fields included."""

START_WITHIN_SECONDS = 3600
"""A controller that was away catches up within the hour, or leaves it for the next time."""

TIMEOUT_SECONDS = 7 * 86_400
"""A run that takes longer holds up no later ones: the wait ends, and the next time attaches to it."""

BACKOFF_LIMIT = 6
FINAL_CODES = (2, 3, 100, 101, 102, 103)
"""Exit codes of `prism submit --wait` after which a retry is useless (launcher/cli/exit_codes.py). 1 is retried: the API
server did not answer."""

FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day of month", 1, 31), ("month", 1, 12), ("day of week", 0, 6))
"""Of a cron expression: name, first and last value, as Kubernetes' parser has them. Sunday is 0 there, and never 7."""

MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
NAMES = {
    "month": {name: place + 1 for place, name in enumerate(MONTHS)},
    "day of week": {name: place for place, name in enumerate(WEEKDAYS)},
}
MACROS = ("@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly")
ITEM = re.compile(r"(?:(?P<all>[*?])|(?P<first>\w+)(?:-(?P<last>\w+))?)(?:/(?P<step>\d+))?$")
DAYS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
ZONE = re.compile(r"[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z0-9_+-]+){0,2}$")


def cron_job(
    run: SelectionRun,
    text: str,
    namespace: str,
    cron: str,
    *,
    image: str,
    service_account: str = "prism-driver",
    time_zone: str | None = None,
    timeout_seconds: int = TIMEOUT_SECONDS,
) -> list[Object]:
    """The two objects, the ConfigMap first.

    Args:
        run: the checked document.
        text: the document as it was given; the pod reads the very same.
        cron: five fields, or @daily and its like.
        image: the launcher's.
        service_account: one with the driver's rights (k8s/rbac.yaml).
        time_zone: Europe/Berlin, say; None: that of the cluster's controller, mostly UTC.
        timeout_seconds: after so long the pod stops waiting.

    Raises:
        SpecError: no such time, or zone; or the document is too large.
    """
    check_cron(cron)
    if time_zone is not None and (not ZONE.match(time_zone) or time_zone == "Local"):
        fix = "give a name of the time zone database: Etc/UTC, Europe/Berlin"
        raise SpecError(f"'{time_zone}' is no time zone", where="--time-zone", fix=fix)
    if len(text.encode()) > LARGEST_DOCUMENT_BYTES:
        fix = f"at most {LARGEST_DOCUMENT_BYTES:,} bytes fit into a ConfigMap"
        raise SpecError(f"the document has {len(text.encode()):,} bytes", where=run.metadata.name, fix=fix)
    metadata = {"name": schedule_name(run.metadata.name), "namespace": namespace, "labels": _labels(run)}
    document = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {DOCUMENT: text}}
    spec = {
        "schedule": cron,
        **({"timeZone": time_zone} if time_zone else {}),
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": START_WITHIN_SECONDS,
        "successfulJobsHistoryLimit": 3,
        "failedJobsHistoryLimit": 3,
        "jobTemplate": {
            "metadata": {"labels": _labels(run)},
            "spec": _job(run, namespace, image, service_account, timeout_seconds),
        },
    }
    # Its own copy of the metadata: a YAML writer would else make the second an alias of the first.
    metadata = {**metadata, "labels": _labels(run)}
    return [document, {"apiVersion": "batch/v1", "kind": "CronJob", "metadata": metadata, "spec": spec}]


def schedule_name(run: str) -> str:
    """Of both objects. A run's name on a cluster has at most 40 characters."""
    name = f"{run}-schedule"
    assert len(name) <= LONGEST_NAME, "parse_for_cluster refuses a longer name of a run"
    return name


def check_cron(expression: str) -> None:
    """Raises SpecError unless Kubernetes' parser takes it, and it names a day that there is."""
    if expression in MACROS:
        return
    words = expression.split()
    if expression.startswith("@"):
        raise _wrong(expression, f"there are {', '.join(MACROS)}")
    if words and "TZ=" in words[0]:
        raise _wrong(expression, "the time zone is an option of its own: --time-zone")
    if len(words) != len(FIELDS):
        raise _wrong(expression, f"it has {len(words)} fields; five are wanted: minute hour day month weekday")
    values = [_values(expression, word, *field) for word, field in zip(words, FIELDS, strict=True)]
    _, _, days, months, _ = values
    # A day of the month and a day of the week that are both given mean: either of them.
    if words[4][0] in "*?" and min(days) > max(DAYS[month - 1] for month in months):
        raise _wrong(expression, "no such day is in such a month, so it would never run")


def _values(expression: str, word: str, name: str, lowest: int, highest: int) -> set[int]:
    """What a field means."""
    found: set[int] = set()
    for item in word.split(","):
        match = ITEM.match(item)
        if match is None:
            raise _wrong(expression, f"'{item}' is no {name}")
        step = int(match["step"] or 1)
        first = lowest if match["all"] else _value(expression, match["first"], name)
        last = _value(expression, match["last"], name) if match["last"] else first
        if match["all"] or (match["step"] and not match["last"]):
            last = highest  # 5/15 is short for 5-59/15
        if not lowest <= first <= last <= highest:
            sunday = "; Sunday is 0" if name == "day of week" else ""
            raise _wrong(expression, f"'{item}' is outside of {lowest} to {highest}, the {name}{sunday}, or backwards")
        if step == 0:
            raise _wrong(expression, f"'{item}' has a step of 0")
        found |= set(range(first, last + 1, step))
    return found


def _value(expression: str, word: str, name: str) -> int:
    named = NAMES.get(name, {}).get(word.lower())
    if named is not None:
        return named
    if not re.fullmatch(r"[0-9]{1,4}", word):
        raise _wrong(expression, f"'{word}' is no {name}")
    return int(word)


def _wrong(expression: str, why: str) -> SpecError:
    fix = "say when like this: '0 3 * * *' for every night at three, '30 6 * * mon-fri', or @daily"
    return SpecError(f"'{expression}' is no cron expression: {why}", where="--cron", fix=fix)


def _labels(run: SelectionRun) -> dict[str, str]:
    """Not those of a run's children: this Job is none of them, and is not to be taken for one."""
    names = {"app.kubernetes.io/name": "prism", "app.kubernetes.io/component": "driver"}
    return {**names, f"{API_GROUP}/schedule": run.metadata.name}


def _job(run: SelectionRun, namespace: str, image: str, service_account: str, timeout_seconds: int) -> Object:
    return {
        "activeDeadlineSeconds": timeout_seconds,
        "backoffLimit": BACKOFF_LIMIT,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": list(FINAL_CODES)},
                },
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {
            "metadata": {"labels": _labels(run)},
            "spec": {
                "restartPolicy": "Never",
                "serviceAccountName": service_account,
                "automountServiceAccountToken": True,
                "enableServiceLinks": False,
                "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
                "containers": [_container(image, namespace)],
                "volumes": [
                    {"name": "document", "configMap": {"name": schedule_name(run.metadata.name)}},
                    {"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}},
                ],
            },
        },
    }


def _container(image: str, namespace: str) -> Object:
    return {
        "name": CONTAINER,
        "image": image,
        "command": ["prism"],
        "args": ["submit", "--wait", f"--namespace={namespace}", f"{FOLDER}/{DOCUMENT}"],
        "env": [{"name": "HOME", "value": "/tmp"}, {"name": "TMPDIR", "value": "/tmp"}],
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"cpu": "1", "memory": "512Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "document", "mountPath": FOLDER, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }
