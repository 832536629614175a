"""A scheduled run: a ConfigMap with the document, and a CronJob whose pod submits it and waits. Pure: makes no requests.

The pod is light (the launcher's image, no torch); the work is done by the Jobs of the run. Each time the same document is
submitted again, and only what its data gained since is extracted. A pod that is lost is replaced, and the next one attaches
to the same run. The API server validates the schedule.
"""

from zoneinfo import available_timezones

from launcher.render.pod import RESTRICTED_CONTAINER, RESTRICTED_POD
from launcher.resource.names import API_GROUP
from launcher.resource.object import Object
from prism_job.errors import SpecError
from prism_job.spec.document import SelectionRun

CONTAINER = "submit"
FOLDER, DOCUMENT = "/etc/prism", "selection.yaml"

LARGEST_DOCUMENT_BYTES = 900_000
"""A ConfigMap holds 1 MiB, its own fields included."""

START_WITHIN_SECONDS = 3600
"""A start that was missed is made up for within this time, else skipped."""

TIMEOUT_SECONDS = 7 * 86_400
"""After this long the pod stops waiting; the next one attaches to the run, which continues."""

BACKOFF_LIMIT = 6
FINAL_PRISM_CODES = (2, 3, 100, 101, 102, 103)
"""Exit codes of `prism submit --wait` after which a retry is useless (launcher/cli/exit_codes.py). 1 is retried: the API
server did not answer."""

MACROS = ["@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly"]


def cron_job(
    run: SelectionRun,
    text: str,
    namespace: str,
    cron: str,
    *,
    image: str,
    service_account: str = "prism-driver",
    time_zone: str | None = None,
) -> list[Object]:
    """The two objects, the ConfigMap first.

    Args:
        run: the checked document.
        text: the document as it was written; the pod reads this text.
        cron: five fields, or a macro such as @daily.
        image: the launcher's.
        service_account: one with the driver's rights (k8s/rbac.yaml).
        time_zone: for example Europe/Berlin; None: that of the cluster's controller, mostly UTC.

    Raises:
        SpecError: no schedule or time zone, or the document is too large.
    """
    check_schedule(cron, time_zone)
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
            "spec": _job(run, namespace, image, service_account),
        },
    }
    # A copy of the metadata: a YAML writer would make an alias of the same object.
    metadata = {**metadata, "labels": _labels(run)}
    return [document, {"apiVersion": "batch/v1", "kind": "CronJob", "metadata": metadata, "spec": spec}]


def schedule_name(run: str) -> str:
    """The name of both objects. A CronJob's name ends at 52 characters, a run's on a cluster at 40."""
    return f"{run}-schedule"


def check_schedule(cron: str, time_zone: str | None) -> None:
    """An early SpecError for the usual mistakes. The values of the fields are the API server's to check."""
    if len(cron.split()) != 5 and cron not in MACROS:
        fields = "five fields: minute, hour, day of month, month, day of week"
        what = f"'{cron}' is not a cron schedule, which has {fields}, or is one of {', '.join(MACROS)}"
        fix = "write it like '0 3 * * *' for every night at three, or @daily; a time zone goes into --time-zone"
        raise SpecError(what, where="--cron", fix=fix)
    known_zones = available_timezones()  # empty where the machine has no time zone database
    if time_zone is not None and known_zones and time_zone not in known_zones:
        fix = "use a name of the time zone database, for example Etc/UTC or Europe/Berlin"
        raise SpecError(f"'{time_zone}' is no time zone", where="--time-zone", fix=fix)


def _labels(run: SelectionRun) -> dict[str, str]:
    """Without the labels of a run's children: this Job is none of them."""
    names = {"app.kubernetes.io/name": "prism", "app.kubernetes.io/component": "driver"}
    return {**names, f"{API_GROUP}/schedule": run.metadata.name}


def _job(run: SelectionRun, namespace: str, image: str, service_account: str) -> Object:
    final = {"containerName": CONTAINER, "operator": "In", "values": list(FINAL_PRISM_CODES)}
    return {
        "activeDeadlineSeconds": TIMEOUT_SECONDS,
        "backoffLimit": BACKOFF_LIMIT,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": final},
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
                "securityContext": RESTRICTED_POD,
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
        "securityContext": RESTRICTED_CONTAINER,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "document", "mountPath": FOLDER, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }
