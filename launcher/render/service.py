"""The headless Service by which the nodes of a group find their master."""

from launcher.render.attempt import Attempt
from launcher.render.shared_objects import child_metadata
from launcher.resource.names import labels_of_run
from launcher.resource.object import Object


def services(attempt: Attempt) -> list[Object]:
    """One Service, the same for all attempts of a group; none where the stage runs on one node."""
    if attempt.num_nodes == 1:
        return []
    run, labels = attempt.run, attempt.stage_labels
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": child_metadata(run, attempt.namespace, attempt.service_name, attempt.owner, labels),
            "spec": {
                "clusterIP": "None",
                # Ranks look for their master before it is ready, and it is ready only once they have met.
                "publishNotReadyAddresses": True,
                "selector": {**labels_of_run(run.metadata.name), **labels},
            },
        }
    ]
