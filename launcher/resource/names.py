"""Names, labels and annotations of everything that the launcher keeps in a cluster. Makes no objects.

Names of children are functions of (run, stage, group, round, attempt) alone, so that doing a thing twice makes one object.
"""

from pydantic import TypeAdapter, ValidationError

from prism_job.spec.digest import digest
from prism_job.spec.document import API_VERSION
from prism_job.spec.section import DnsLabel

API_GROUP, VERSION = API_VERSION.split("/")
KIND, PLURAL = "SelectionRun", "selectionruns"
MANAGER = "prism"
"""Our field manager, and the value of `app.kubernetes.io/managed-by`."""

RUN_LABEL, STAGE_LABEL, GROUP_LABEL, ROUND_LABEL, ATTEMPT_LABEL = (
    f"{API_GROUP}/{name}" for name in ("run", "stage", "group", "round", "attempt")
)
MANAGED_LABELS = {"app.kubernetes.io/name": "prism", "app.kubernetes.io/managed-by": MANAGER}
CANCEL_ANNOTATION = f"{API_GROUP}/cancel"
"""Its value is the round (`spec.retry`) that is cancelled. A later round is not."""

RECORD_LABEL = f"{API_GROUP}/record"
"""On a ConfigMap that is a record. The ConfigMap from which pods read their document does not have it."""

INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"
"""Kubernetes' own, and a label too: which pod of an Indexed Job it is."""

WORKER_CONTAINER = "worker"
"""Of the pods of a run."""

LEASE, OPERATOR_NAMESPACE = "prism-operator", "prism-system"
"""The lease that operators elect their leader by, and where k8s/ installs the operator."""

LONGEST_NAME = 40
"""Characters of a run's name on a cluster: names of Jobs, pods and services add to it, and a host name ends at 63."""

LONGEST_JOB_NAME = 59
"""Of a Job: a pod's host name adds a hyphen and its index, of three digits at most."""


_DNS_LABEL = TypeAdapter(DnsLabel)


def is_dns_label(text: str) -> bool:
    """Whether a run or a namespace can have this name."""
    try:
        _DNS_LABEL.validate_python(text)
    except ValidationError:
        return False
    return True


def job_name(run: str, stage: str, group: int, round_number: int, attempt: int) -> str:
    """`curate-math-extract-2-0-1`: group 2, round 0, attempt 1; the other stages have no group.

    A long name with large numbers would pass LONGEST_JOB_NAME: its end is then a digest of the whole.
    """
    stage_and_group = f"{stage}-{group}" if stage == "extract" else stage
    name = f"{run}-{stage_and_group}-{round_number}-{attempt}"
    if len(name) <= LONGEST_JOB_NAME:
        return name
    return f"{name[: LONGEST_JOB_NAME - 17]}-{digest(name)[:16]}"


def pod_prefix(stage: str, group: int | str, attempt: int | str, node: int | str | None = None) -> str:
    """What names a pod in merged logs: `plan`, `extract-0`, `extract-0.1` (its second attempt), `extract-0.1/2` (node 2).

    Args:
        node: None where the stage or group runs on one node.
    """
    group_part = f"-{group}" if stage == "extract" else ""
    return f"{stage}{group_part}{f'.{attempt}' if str(attempt) != '0' else ''}{'' if node is None else f'/{node}'}"


def record_name(run: str) -> str:
    """Of the ConfigMap that stands for a SelectionRun."""
    return f"{run}-prism-record"


def labels_of_run(run: str) -> dict[str, str]:
    """On every child, and what the children are found by."""
    return {**MANAGED_LABELS, RUN_LABEL: run}
