"""A Job controller for the test cluster: makes the pods of batch/v1 Jobs, counts them, says how the Job is.

What to do is decided in job_rules.py; here it is done. Knows nothing of how pods run.
"""

from __future__ import annotations

import time
from pathlib import Path

from tests.cluster.kubelet.job_rules import TRACKING, Decision, decide, job_to_pod
from tests.cluster.kubelet.mirror import Controller, Key, Refused, Thing, key_of, owned_by, uid_of
from tests.cluster.kubelet.pods import pod_path

KIND = {"apiVersion": "batch/v1", "kind": "Job"}
BATCH_SECONDS = 0.1
"""How long changes of pods gather before a look; in a real controller 1 s."""


class JobController(Controller):
    """Runs from `with` on."""

    def __init__(self, kubeconfig: Path) -> None:
        super().__init__(kubeconfig, "job-controller")
        self._counted: dict[str, set[str]] = {}
        # Job uid: a status that was sent and not heard of, and the pods that it counts.
        self._unsure: dict[str, tuple[Thing, set[str]]] = {}
        self._refusals: dict[str, tuple[int, float]] = {}  # Job uid: how many in a row, no creation before
        self._jobs = self.mirror("/apis/batch/v1/jobs", lambda job: self.queue.add(key_of(job)))
        self._pods = self.mirror("/api/v1/pods", self._pod_changed)

    def __enter__(self) -> JobController:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _pod_changed(self, pod: Thing) -> None:
        owner = owned_by(pod)
        if owner and owner["kind"] == "Job":
            self.queue.add((pod["metadata"]["namespace"], owner["name"]), BATCH_SECONDS)

    def sync(self, key: Key) -> None:
        job = self._jobs.get(key)
        self._free_orphans(key, job)
        if job is None:
            return
        uid = uid_of(job)
        pods = [pod for pod in self._pods.all() if (owner := owned_by(pod)) and owner["uid"] == uid]
        counted = self._counted.setdefault(uid, set())
        if uid in self._unsure:
            self._settle(key, uid, counted)
            return
        self._act(key, job, decide(job, pods, counted, time.time()), counted)

    def _act(self, key: Key, job: Thing, decision: Decision, counted: set[str]) -> None:
        path = f"/apis/batch/v1/namespaces/{key[0]}/jobs/{key[1]}"
        for pod in decision.release:
            self._delete(self._strip(pod))
        for pod in decision.delete:
            self._delete(pod)
        created = self._create(key, job, decision.create)
        if created:
            decision.status["active"] = decision.status.get("active", 0) + created
        if decision.status != (job.get("status") or {}):
            self._unsure[uid_of(job)] = (decision.status, decision.counted)
            self._jobs.put(self.api.ask("PUT", f"{path}/status", {**job, **KIND, "status": decision.status}))
            del self._unsure[uid_of(job)]
        counted |= decision.counted
        for pod in decision.strip:
            self._strip(pod)
        for reason, message in decision.events:
            self.tell(job, "Job", reason, message, warning=reason not in ("Completed", "Suspended", "Resumed"))

    def _settle(self, key: Key, uid: str, counted: set[str]) -> None:
        """Look whether a status whose answer got lost was written: its pods are counted then. The next round decides."""
        now = self.api.ask("GET", f"/apis/batch/v1/namespaces/{key[0]}/jobs/{key[1]}")
        status, pods = self._unsure.pop(uid)
        if uid_of(now) == uid and now.get("status") == status:
            counted |= pods
        self._jobs.put(now)
        self.queue.add(key)

    def _create(self, key: Key, job: Thing, indexes: list[int]) -> int:
        """How many of them now exist. A refusal is told as an Event and ends the round; the next try waits."""
        refusals, not_before = self._refusals.get(uid_of(job), (0, 0.0))
        if indexes and time.monotonic() < not_before:
            self.queue.add(key, not_before - time.monotonic())
            return 0
        for number, index in enumerate(indexes):
            pod = job_to_pod(job, index)
            try:
                self._pods.put(self.api.ask("POST", f"/api/v1/namespaces/{key[0]}/pods", pod))
            except Refused as refusal:
                if refusal.reason == "AlreadyExists":
                    continue  # made by a try whose answer got lost: the name is random
                wait = min(2.0**refusals, 60.0)
                self._refusals[uid_of(job)] = (refusals + 1, time.monotonic() + wait)
                self.queue.add(key, wait)
                if "being terminated" not in refusal.message:
                    self.tell(job, "Job", "FailedCreate", f"Error creating: {refusal.message}", warning=True)
                return number
            self._refusals.pop(uid_of(job), None)
            self.tell(job, "Job", "SuccessfulCreate", f"Created pod: {pod['metadata']['name']}")
        return len(indexes)

    def _delete(self, pod: Thing | None) -> None:
        if pod is None:
            return
        path, options = pod_path(key_of(pod)), {"apiVersion": "v1", "kind": "DeleteOptions"}
        try:
            answer = self.api.ask("DELETE", path, {**options, "preconditions": {"uid": uid_of(pod)}})
        except Refused as refusal:
            if refusal.status not in (404, 409):
                raise
        else:
            self._pods.put(answer)

    def _strip(self, pod: Thing) -> Thing | None:
        """The pod without the tracking finalizer; None if it is gone. The newest version counts, whatever was decided on."""
        pod = self._pods.get(key_of(pod)) or pod
        held = pod["metadata"].get("finalizers") or []
        if TRACKING not in held:
            return pod
        left = [name for name in held if name != TRACKING]
        change = {"uid": uid_of(pod), "resourceVersion": pod["metadata"]["resourceVersion"], "finalizers": left or None}
        try:
            stripped = self.api.ask("PATCH", pod_path(key_of(pod)), {"metadata": change})
        except Refused as refusal:
            if refusal.status != 404:
                raise
            return None
        self._pods.put(stripped)
        return stripped

    def _free_orphans(self, key: Key, job: Thing | None) -> None:
        """Pods whose Job is gone must not linger because of its finalizer."""
        for pod in self._pods.all():
            owner = owned_by(pod)
            if pod["metadata"]["namespace"] != key[0] or TRACKING not in (pod["metadata"].get("finalizers") or []):
                continue
            if owner and owner["name"] == key[1] and (job is None or owner["uid"] != uid_of(job)):
                try:
                    now = self.api.ask("GET", f"/apis/batch/v1/namespaces/{key[0]}/jobs/{key[1]}")
                except Refused:
                    self._strip(pod)
                else:
                    if uid_of(now) != owner["uid"]:
                        self._strip(pod)
                    self._jobs.put(now)
