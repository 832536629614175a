"""The Job of one attempt. Pure: no clock, no cluster. A pod that fails ends its Job; the next attempt is another Job."""

from launcher.render.attempt import Attempt
from launcher.render.pod import pod_template
from launcher.render.shared_objects import child_metadata
from launcher.resource.names import WORKER_CONTAINER, labels_of_run
from launcher.resource.object import Object
from launcher.resource.overlay import merge
from prism_job.errors import DataError, RequestError

QUEUE = "kueue.x-k8s.io/queue-name"

FINAL_STAGE_CODES = [RequestError.exit_code, DataError.exit_code]
"""64 and 65: no further attempt can succeed, so the first pod that ends with one of them ends its Job."""


def job(attempt: Attempt) -> Object:
    """An Indexed Job, one pod a node. What its failure leads to is decided in launcher/reconcile/failure_policy.py."""
    run, cluster = attempt.run, attempt.cluster
    queue = {QUEUE: cluster.queue_name} if cluster.queue_name else {}
    own_labels = {"metadata": {"labels": {**labels_of_run(run.metadata.name), **attempt.labels}}}
    final = {"containerName": WORKER_CONTAINER, "operator": "In", "values": FINAL_STAGE_CODES}
    template = merge(pod_template(attempt), cluster.pod_overlay)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": child_metadata(
            run, attempt.namespace, attempt.job_name, attempt.owner, {**attempt.labels, **queue}
        ),
        "spec": {
            "completionMode": "Indexed",
            "completions": attempt.num_nodes,
            "parallelism": attempt.num_nodes,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {
                "rules": [
                    {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {"action": "FailJob", "onExitCodes": final},
                ]
            },
            # Our labels last: a pod is found by them, and no overlay may hand it to another run.
            "template": merge(template, own_labels),
        },
    }
