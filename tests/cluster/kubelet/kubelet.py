"""The kubelet of a few fake nodes (nodes.py): pods of an API server run as local processes and say how they are.

Knows nothing of Jobs, nor of what runs in the pods (container.py starts it).
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tests.cluster.certificates import Authority
from tests.cluster.kubelet.container import Container, Fetch, Names, NotHere, NotYet, send, start
from tests.cluster.kubelet.logserver import Log, LogServer, NoLog
from tests.cluster.kubelet.mirror import Controller, Key, Refused, Thing, key_of, stamp, uid_of
from tests.cluster.kubelet.nodes import Nodes
from tests.cluster.kubelet.pods import (
    OVER,
    container_status,
    delete_now,
    disrupt,
    kept_conditions,
    patch_status,
    pod_path,
    with_condition,
)
from tests.cluster.kubelet.tokens import Tokens
from tests.cluster.podlogs import PodLogs


class ControlPlane(Protocol):
    """What a kubelet must know of a real one."""

    url: str
    authority: Authority


ONE_NODE = {"node-a": {"nvidia.com/gpu": "8", "cpu": "64", "memory": "512Gi"}}
BACK_OFF_SECONDS = 1.0
"""After it ErrImagePull turns ImagePullBackOff; a real kubelet takes about ten."""
RESTART_SECONDS, LONGEST_RESTART_SECONDS = 1.0, 8.0
"""Before a container is started again, doubled each time; a real kubelet waits 10 to 300."""


@dataclass
class _Restarts:
    """Of one pod's container."""

    number: int
    start_at: float  # monotonic
    last: dict[str, Any]
    """How it ended the last time: a `terminated` state."""


class Kubelet:
    """Runs from `with` on; at the end no process is left.

    `nodes`: name -> capacity. `environment` reaches every process and wins over its pod's.
    `control_plane`: a real one, which schedules, collects and evicts; its pods get tokens and its proxy shows their logs.
    `pod_gc_seconds`: how long pods outlive a deleted Node. `token_life_share`: after which a pod's token is renewed.
    """

    def __init__(
        self,
        kubeconfig: Path,
        folder: Path,
        *,
        nodes: Mapping[str, Mapping[str, str]] = ONE_NODE,
        log_folder: Path,
        environment: Mapping[str, str] | None = None,
        control_plane: ControlPlane | None = None,
        pod_gc_seconds: float = 1.0,
        token_life_share: float = 0.8,
    ) -> None:
        self.missing_images: set[str] = set()
        self._nodes = Nodes(kubeconfig, nodes, control_plane is None, pod_gc_seconds)
        self._runner = _Runner(kubeconfig, folder, log_folder, environment or {}, self._nodes, self.missing_images)
        self._api = self._runner.api
        self._log_server: LogServer | None = None
        if control_plane is not None:
            self._runner.serve(Tokens(self._api, token_life_share), control_plane.url)
            serving = control_plane.authority.sign("kubelet", hosts=("127.0.0.1",))
            ca = control_plane.authority.pair.certificate
            self._log_server = LogServer(self._runner.logs, self._runner.find_log, serving, ca)
            self._nodes.log_port = self._log_server.port

    def __enter__(self) -> Kubelet:
        try:
            if self._log_server is not None:
                self._log_server.start()
            self._nodes.register()
            self._nodes.start()
            self._runner.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._nodes.stop()
        self._runner.stop()
        self._runner.end_all()
        if self._log_server is not None:
            self._log_server.stop()

    def pid(self, namespace: str, pod: str) -> int | None:
        """The main process of a pod, while it runs."""
        container = self._runner.containers.get((namespace, pod))
        return container.process.pid if container and container.is_running() else None

    def kill(self, namespace: str, pod: str, number: int = signal.SIGKILL) -> None:
        """A crash: the signal goes to the pod's main process."""
        if (pid := self.pid(namespace, pod)) is None:
            raise KeyError(f"no process of pod {namespace}/{pod} runs")
        send(pid, number)

    def oom_kill(self, namespace: str, pod: str) -> None:
        self._runner.containers[namespace, pod].oom = True
        self.kill(namespace, pod)

    def evict(self, namespace: str, pod: str) -> None:
        """DisruptionTarget, then a deletion with the pod's grace."""
        disrupt(self._runner, (namespace, pod), "EvictionByEvictionAPI")
        self._api.ask("DELETE", pod_path((namespace, pod)))

    def lose_node(self, name: str, *, freeze: bool = False) -> None:
        """Nothing of it is reported any more. Its processes die with it, or stand still until it returns."""
        self._nodes.away.add(name)
        for container in self._runner.of_node(name):
            container.signal_all(signal.SIGSTOP if freeze else signal.SIGKILL)
        if not self._nodes.with_controllers:
            return  # the real controller notices
        self._nodes.report(name)
        for pod in self._nodes.pods.all():
            if pod["spec"].get("nodeName") == name and pod["status"].get("phase") == "Running":
                self._not_ready(pod)

    def return_node(self, name: str) -> None:
        self._nodes.away.discard(name)
        for container in self._runner.of_node(name):
            container.signal_all(signal.SIGCONT)
        self._nodes.report(name)
        self._runner.look_at_all()

    def delete_node(self, name: str) -> None:
        """The machine is gone for good, and its Node: pod GC fails its pods."""
        self._nodes.away.add(name)
        self._nodes.capacities.pop(name, None)
        for container in self._runner.of_node(name):
            container.end()
        self._api.ask("DELETE", f"/api/v1/nodes/{name}")

    def _not_ready(self, pod: Thing) -> None:
        """As the node lifecycle controller does it."""
        conditions = with_condition(pod, {"type": "Ready", "status": "False"})
        try:
            self._api.ask("PATCH", pod_path(key_of(pod), "/status"), {"status": {"conditions": conditions}})
        except Refused as refusal:
            if refusal.status != 404:
                raise


class _Runner(Controller):
    """The kubelets: what a bound pod should be, done step by step."""

    def __init__(
        self,
        kubeconfig: Path,
        folder: Path,
        log_folder: Path,
        environment: Mapping[str, str],
        nodes: Nodes,
        missing_images: set[str],
    ) -> None:
        super().__init__(kubeconfig, "kubelet")
        self._folder, self.logs, self._environment = folder, PodLogs(log_folder), dict(environment)
        self._nodes, self._missing_images, self._names = nodes, missing_images, Names()
        self._tokens: Tokens | None = None
        self.containers: dict[Key, Container] = {}
        self._restarts: dict[str, _Restarts] = {}  # by pod uid
        self._pulled: dict[str, float] = {}  # pod uid: when its image was first asked for in vain
        self.pods = self.mirror("/api/v1/pods", lambda pod: self.queue.add(key_of(pod)))

    def serve(self, tokens: Tokens, url: str) -> None:
        """Pods get tokens of their service accounts, and are told where the API server is."""
        host, _, port = url.removeprefix("https://").partition(":")
        self._tokens = tokens
        self._environment |= {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}

    def find_log(self, namespace: str, name: str, container_name: str, query: Mapping[str, str]) -> Log:
        """For the API server's proxy."""
        pod, container = self.pods.get((namespace, name)), self.containers.get((namespace, name))
        if pod is None:
            raise NoLog(404, f"pod does not exist: {namespace}/{name}")
        if container_name != pod["spec"]["containers"][0]["name"]:
            raise NoLog(404, f"container {container_name} not found in pod {name}")
        if pod["spec"].get("nodeName") in self._nodes.away:
            raise NoLog(502, f"node {pod['spec']['nodeName']} does not answer")
        path = self.logs.path(namespace, name, uid_of(pod), container_name)
        if query.get("previous") == "true":
            path = path.with_suffix(".previous.log")
            if not path.exists():
                raise NoLog(400, f'previous terminated container "{container_name}" in pod "{name}" not found')
            return Log(path, lambda: True)
        if container is None and not path.exists():
            raise NoLog(400, f'container "{container_name}" in pod "{name}" is waiting to start: ContainerCreating')
        return Log(path, lambda: container is None or not container.is_running())

    def of_node(self, name: str) -> list[Container]:
        return [container for container in list(self.containers.values()) if container.node == name]

    def look_at_all(self) -> None:
        for key in {*self.containers, *(key_of(pod) for pod in self.pods.all())}:
            self.queue.add(key)

    def end_all(self) -> None:
        for container in self.containers.values():
            container.end()

    def sync(self, key: Key) -> None:
        pod, container = self.pods.get(key), self.containers.get(key)
        if container and container.node in self._nodes.away and container.node in self._nodes.capacities:
            return  # lost: its process is not ours to touch before the node returns
        if container and (pod is None or uid_of(pod) != container.pod_uid):
            self._remove(key, container)
            container = None
        node = pod["spec"].get("nodeName") if pod else None
        if pod is None or node not in self._nodes.capacities or node in self._nodes.away:
            return
        deleted = "deletionTimestamp" in pod["metadata"]
        if pod["status"].get("phase") in OVER:
            if container and container.is_running():
                container.end()
            if deleted:
                delete_now(self, pod)
        elif container is None:
            restarts = self._restarts.get(uid_of(pod))
            if deleted or (restarts is None and pod["status"].get("phase") == "Running"):
                self._report_lost(pod)
            elif restarts is not None and time.monotonic() < restarts.start_at:
                self.queue.add(key, restarts.start_at - time.monotonic() + 0.01)
            else:
                self._start(key, pod)
        elif container.is_running():
            if not container.reported:
                self._report_running(pod, container)
            if deleted:
                self._stop(key, pod, container)
            elif self._tokens is not None and (seconds := self._tokens.renew(pod)) is not None:
                self.queue.add(key, seconds)
        else:
            container.end()
            if _is_restarted(pod, container) and not deleted:
                self._back_off(key, pod, container)
            else:
                self._report_ended(pod, container.terminated(), self._place(pod, container))

    def _remove(self, key: Key, container: Container) -> None:
        """The pod is gone."""
        container.end()
        shutil.rmtree(container.folder, ignore_errors=True)
        del self.containers[key]
        self._restarts.pop(container.pod_uid, None)
        if self._tokens is not None:
            self._tokens.forget(container.pod_uid)

    def _back_off(self, key: Key, pod: Thing, container: Container) -> None:
        """The container has ended, and is to be started again after a while."""
        before = self._restarts.get(container.pod_uid)
        number = before.number + 1 if before else 1
        seconds = min(RESTART_SECONDS * 2 ** (number - 1), LONGEST_RESTART_SECONDS)
        self._restarts[container.pod_uid] = _Restarts(number, time.monotonic() + seconds, container.terminated())
        del self.containers[key]
        if container.log.exists():
            container.log.replace(container.log.with_suffix(".previous.log"))
        name = pod["spec"]["containers"][0]["name"]
        why = f"back-off {seconds:.0f}s restarting failed container={name} pod={'/'.join(key)}"
        self._report_waiting(pod, {"reason": "CrashLoopBackOff", "message": why}, phase="Running")
        self._tell_once(pod, "BackOff", "Back-off restarting failed container")
        self.queue.add(key, seconds + 0.01)

    def _start(self, key: Key, pod: Thing) -> None:
        image = pod["spec"]["containers"][0]["image"]
        if image in self._missing_images:
            self._report_missing_image(key, pod, image)
            return
        try:
            container = start(
                pod, self._folder, self.logs, self._fetch(key[0]), self._environment, self._names, self._tokens
            )
        except NotYet as missing:
            if missing.reason == "ContainerCreating":
                self._report_waiting(pod, {"reason": missing.reason})
                self._tell_once(pod, "FailedMount", missing.message)
            else:
                self._report_waiting(pod, {"reason": missing.reason, "message": missing.message})
                self._tell_once(pod, "Failed", f"Error: {missing.message}")
            self.queue.add(key, 0.5)
            return
        except NotHere as refusal:
            print(f"rig/kubelet: pod {'/'.join(key)}: {refusal}", file=sys.stderr)
            self.tell(pod, "Pod", "UnsupportedByRig", str(refusal), warning=True)
            self._write(pod, {"phase": "Failed", "reason": "UnsupportedByRig", "message": str(refusal)})
            return
        self.containers[key] = container
        threading.Thread(target=self._wait, args=(key, container.process), name=f"wait {key}", daemon=True).start()
        self.queue.add(key)

    def _wait(self, key: Key, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self.queue.add(key)

    def _stop(self, key: Key, pod: Thing, container: Container) -> None:
        """SIGTERM to the main process, once; after the grace SIGKILL to all."""
        grace = pod["metadata"].get("deletionGracePeriodSeconds")
        grace = pod["spec"].get("terminationGracePeriodSeconds", 30) if grace is None else grace
        until = time.monotonic() + max(grace, 1)  # also a forced deletion leaves the process a moment
        if container.stop_before is None:
            send(container.process.pid, signal.SIGTERM)
        container.stop_before = min(until, container.stop_before or until)
        if time.monotonic() >= container.stop_before:
            container.end()
            self.queue.add(key)
        else:
            self.queue.add(key, container.stop_before - time.monotonic() + 0.01)

    def _fetch(self, namespace: str) -> Fetch:
        def fetch(plural: str, name: str) -> Thing | None:
            try:
                return self.api.ask("GET", f"/api/v1/namespaces/{namespace}/{plural}/{name}")
            except Refused as refusal:
                if refusal.status != 404:
                    raise
                return None

        return fetch

    def _ip(self, pod: Thing) -> str:
        number = int(uid_of(pod).replace("-", "")[:6], 16)
        return f"127.{number >> 16}.{number >> 8 & 255}.{2 + number % 250}"

    def _place(self, pod: Thing, container: Container) -> Thing:
        """Where and since when a started pod is."""
        started = pod["status"].get("startTime") or stamp(container.started)
        return {"startTime": started, "hostIP": "127.0.0.1", "podIP": self._ip(pod), "podIPs": [{"ip": self._ip(pod)}]}

    def _tell_once(self, pod: Thing, reason: str, message: str) -> None:
        if (uid_of(pod), reason, message) not in self._events:
            self.tell(pod, "Pod", reason, message, warning=True)

    def _report_missing_image(self, key: Key, pod: Thing, image: str) -> None:
        why = f'failed to pull and unpack image "{image}": failed to resolve reference "{image}": {image}: not found'
        tried = time.monotonic() - self._pulled.setdefault(uid_of(pod), time.monotonic())
        if tried >= BACK_OFF_SECONDS:
            message = f'Back-off pulling image "{image}": ErrImagePull: rpc error: code = NotFound desc = {why}'
            self._report_waiting(pod, {"reason": "ImagePullBackOff", "message": message})
            self._tell_once(pod, "BackOff", f'Back-off pulling image "{image}"')
        else:
            message = f"rpc error: code = NotFound desc = {why}"
            self._report_waiting(pod, {"reason": "ErrImagePull", "message": message})
            self._tell_once(pod, "Failed", f'Failed to pull image "{image}": {message}')
        self.queue.add(key, BACK_OFF_SECONDS + 0.01)

    def _status_of(self, pod: Thing, state: Thing) -> list[Thing]:
        restarts = self._restarts.get(uid_of(pod))
        return [
            container_status(pod, state, restarts.number, restarts.last) if restarts else container_status(pod, state)
        ]

    def _report_waiting(self, pod: Thing, waiting: dict[str, str], *, phase: str = "Pending") -> None:
        unready = f"containers with unready status: [{pod['spec']['containers'][0]['name']}]"
        conditions = kept_conditions(pod, ready=False, reason="ContainersNotReady", message=unready)
        statuses = self._status_of(pod, {"waiting": waiting})
        self._write(pod, {"phase": phase, "conditions": conditions, "containerStatuses": statuses})

    def _report_running(self, pod: Thing, container: Container) -> None:
        statuses = self._status_of(pod, {"running": {"startedAt": stamp(container.started)}})
        shown = {
            "conditions": kept_conditions(pod, ready=True),
            "containerStatuses": statuses,
            **self._place(pod, container),
        }
        self._write(pod, {"phase": "Running", **shown})
        container.reported = True

    def _report_lost(self, pod: Thing) -> None:
        """A pod that was deleted before it ran, or whose process went with an earlier kubelet."""
        message = "The container could not be located when the pod was terminated"
        self._report_ended(pod, {"exitCode": 137, "reason": "ContainerStatusUnknown", "message": message})

    def _report_ended(self, pod: Thing, ended: dict[str, Any], place: Thing | None = None) -> None:
        good = ended["exitCode"] == 0
        conditions = kept_conditions(pod, ready=False, reason="PodCompleted" if good else "PodFailed")
        statuses = self._status_of(pod, {"terminated": ended})
        shown = {"conditions": conditions, "containerStatuses": statuses, **(place or {})}
        self._write(pod, {"phase": "Succeeded" if good else "Failed", **shown})

    def _write(self, pod: Thing, status: Thing) -> None:
        patch_status(self, pod, {"startTime": pod["status"].get("startTime") or stamp(time.time()), **status})


def _is_restarted(pod: Thing, container: Container) -> bool:
    policy = pod["spec"].get("restartPolicy", "Always")
    return bool(policy == "Always" or (policy == "OnFailure" and container.terminated()["exitCode"] != 0))
