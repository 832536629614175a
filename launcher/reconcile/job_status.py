"""The state of a Job, from its conditions. Pure."""

from typing import Any

Object = dict[str, Any]


def true_conditions(job: Object) -> dict[str, Object]:
    """Conditions that hold, by type."""
    return {one["type"]: one for one in job.get("status", {}).get("conditions") or () if one["status"] == "True"}


def is_finished(job: Object) -> bool:
    """Whether it has completed or failed: all its pods have ended."""
    return not true_conditions(job).keys().isdisjoint(("Complete", "Failed"))


def is_suspended(job: Object) -> bool:
    """Whether its controller reports it as suspended, which lags a moment behind `spec.suspend`."""
    return "Suspended" in true_conditions(job)


def is_being_deleted(job: Object) -> bool:
    return "deletionTimestamp" in job["metadata"]
