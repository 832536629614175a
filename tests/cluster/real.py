"""A real control plane in the fake's place: etcd, API server, controller-manager, scheduler, where KUBEBUILDER_ASSETS names
the folder of their binaries (the envtest convention). Nodes and pods are played by tests/cluster/kubelet/kubelet.py.

RBAC is on, and every client verifies the API server's certificate. What the kubeconfig without a token may do is everything:
it is for the rig itself; accounts.py has those that the launcher runs as.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3
import yaml

from tests.cluster.certificates import Authority
from tests.cluster.kubelet.mirror import Api, Refused, Unreachable

BINARIES = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
CORE = ["configmaps", "events", "namespaces", "nodes", "pods", "resourcequotas", "serviceaccounts", "services"]
GROUPS = dict.fromkeys(CORE, "v1") | {"cronjobs": "batch/v1", "jobs": "batch/v1", "leases": "coordination.k8s.io/v1"}
GROUPS |= {"networkpolicies": "networking.k8s.io/v1", "selectionruns": "prism.dev/v1alpha1", "deployments": "apps/v1"}
"""Plural -> its group and version."""
CLUSTER_WIDE = ("namespaces", "nodes", "validatingadmissionpolicies", "validatingadmissionpolicybindings")
START_SECONDS = 90.0
AUDIT_POLICY = """apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - level: None
    users: [administrator]
  - level: Metadata
"""
LOST_NODE_SECONDS = 12
"""Without a renewed Lease for so long a node counts as lost. Kubernetes' own default is 50."""
TOLERATION_SECONDS = 2
"""A pod without tolerations of its own stays on a lost node for so long; 300 by default."""


def missing_binaries() -> str:
    """Why no real control plane can be started here; empty where one can."""
    folder = os.environ.get("KUBEBUILDER_ASSETS")
    if not folder:
        return "KUBEBUILDER_ASSETS is not set"
    lacking = [name for name in BINARIES if not (Path(folder) / name).exists()]
    return f"KUBEBUILDER_ASSETS lacks {', '.join(lacking)}" if lacking else ""


class RealServer:
    """The same verbs as ApiServer's, of those that tests of whole runs use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = _free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        self._stack = contextlib.ExitStack()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> RealServer:
        try:
            self._start_all()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def kubeconfig(self, path: Path, *, namespace: str = "default", token: str | None = None) -> Path:
        """Writes a kubeconfig; without a token it is the administrator's."""
        certificate = base64.b64encode(self.authority.pair.certificate.read_bytes()).decode()
        administrator = {"client-certificate": str(self._admin.certificate), "client-key": str(self._admin.key)}
        cluster = {"server": self.url, "certificate-authority-data": certificate}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "real",
            "clusters": [{"name": "real", "cluster": cluster}],
            "users": [{"name": "user", "user": {"token": token} if token else administrator}],
            "contexts": [{"name": "real", "context": {"cluster": "real", "user": "user", "namespace": namespace}}],
        }
        path.write_text(yaml.safe_dump(document))
        return path

    # For tests: the same verbs as the administrator

    def objects(self, plural: str, namespace: str | None = None) -> list[dict[str, Any]]:
        answer = self.api.ask("GET", _address(GROUPS[plural], plural, namespace))
        # Items of a list carry no kind of their own.
        kind = answer["kind"].removesuffix("List")
        return [{"apiVersion": GROUPS[plural], "kind": kind, **item} for item in answer["items"]]

    def object(self, plural: str, name: str, namespace: str = "default") -> dict[str, Any] | None:
        try:
            return self.api.ask("GET", _address(GROUPS[plural], plural, namespace, name))
        except Refused as refusal:
            if refusal.status != 404:
                raise
            return None

    def create(self, body: dict[str, Any], *, namespace: str = "default") -> dict[str, Any]:
        """Of any kind that the server knows; a CustomResourceDefinition is served when this returns."""
        plural, namespaced = self._resource_of(body)
        place = body["metadata"].get("namespace", namespace) if namespaced else None
        created = self.api.ask("POST", _address(body["apiVersion"], plural, place), body)
        if body["kind"] == "CustomResourceDefinition":
            spec = body["spec"]
            version = f"{spec['group']}/{spec['versions'][0]['name']}"
            self._until(lambda: self.api.ask("GET", _address(version, spec["names"]["plural"], None)))
        return created

    def delete(self, plural: str, name: str, namespace: str = "default") -> None:
        """One object, its children in the background."""
        options = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        self.api.ask("DELETE", _address(GROUPS[plural], plural, namespace, name), options)

    @contextlib.contextmanager
    def outage(self) -> Iterator[None]:
        """The API server's process is killed, and started again at the same port with the same data."""
        process = self._processes["kube-apiserver"]
        process.kill()
        process.wait()
        try:
            yield
        finally:
            self._start_api_server()

    def compact(self) -> None:
        """etcd forgets all versions so far, as the API server asks it to every five minutes."""
        etcd = urllib3.PoolManager()
        newest = etcd.request("POST", f"{self._etcd}/v3/kv/range", json={"key": "AA=="}).json()["header"]["revision"]
        answer = etcd.request("POST", f"{self._etcd}/v3/kv/compaction", json={"revision": newest, "physical": True})
        assert answer.status == 200, answer.data

    def forbidden(self) -> list[str]:
        """What was refused with 403, of everybody but the administrator: 'user verb address', as the audit log has it."""
        events = [json.loads(line) for line in (self.folder / "audit.log").read_text().splitlines() if line]
        return [
            f"{event['user']['username']} {event['verb']} {event['requestURI']}"
            for event in events
            if event.get("responseStatus", {}).get("code") == 403
        ]

    def _resource_of(self, body: dict[str, Any]) -> tuple[str, bool]:
        """The plural of a body's kind, and whether it is namespaced: by discovery."""
        for resource in self.api.ask("GET", _address(body["apiVersion"]))["resources"]:
            if resource["kind"] == body["kind"] and "/" not in resource["name"]:
                return resource["name"], resource["namespaced"]
        raise KeyError(f"the API server knows no {body['kind']} of {body['apiVersion']}")

    # The processes

    def _start_all(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.authority = Authority(self.folder / "certificates")
        self._admin = self.authority.sign("administrator", organization="system:masters")
        self._serving = self.authority.sign("kube-apiserver", hosts=("127.0.0.1", "localhost", "10.0.0.1"))
        self._tokens = self.authority.sign("service-accounts")
        self._kubelet_client = self.authority.sign("kube-apiserver-kubelet-client")
        (self.folder / "audit-policy.yaml").write_text(AUDIT_POLICY)
        etcd, peer = (f"http://127.0.0.1:{_free_port()}" for _ in range(2))
        self._start(
            "etcd",
            f"--data-dir={self.folder / 'etcd'}",
            *(f"--{name}-urls={etcd}" for name in ("listen-client", "advertise-client")),
            *(f"--{name}-urls={peer}" for name in ("listen-peer", "initial-advertise-peer")),
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
        )
        self._etcd = etcd
        kubeconfig = str(self.kubeconfig(self.folder / "kubeconfig"))
        self.api = Api(Path(kubeconfig), "rig")
        self._start_api_server()
        self._start(
            "kube-controller-manager",
            f"--kubeconfig={kubeconfig}",
            f"--service-account-private-key-file={self._tokens.key}",
            f"--root-ca-file={self.authority.pair.certificate}",
            "--leader-elect=false",
            "--secure-port=0",
            "--kube-api-qps=200",
            "--kube-api-burst=400",
            "--node-monitor-period=1s",
            f"--node-monitor-grace-period={LOST_NODE_SECONDS}s",
        )
        self._start("kube-scheduler", f"--kubeconfig={kubeconfig}", "--leader-elect=false", "--secure-port=0")
        self._until(lambda: self.object("serviceaccounts", "default"))

    def _start_api_server(self) -> None:
        ca, key = self.authority.pair.certificate, self._tokens.key
        self._start(
            "kube-apiserver",
            f"--etcd-servers={self._etcd}",
            f"--secure-port={self.port}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            "--endpoint-reconciler-type=none",  # a loopback address is no endpoint of a Service
            f"--client-ca-file={ca}",
            f"--tls-cert-file={self._serving.certificate}",
            f"--tls-private-key-file={self._serving.key}",
            f"--kubelet-certificate-authority={ca}",
            f"--kubelet-client-certificate={self._kubelet_client.certificate}",
            f"--kubelet-client-key={self._kubelet_client.key}",
            "--kubelet-preferred-address-types=InternalIP",
            "--authorization-mode=RBAC",
            "--enable-admission-plugins=OwnerReferencesPermissionEnforcement",
            f"--default-not-ready-toleration-seconds={TOLERATION_SECONDS}",
            f"--default-unreachable-toleration-seconds={TOLERATION_SECONDS}",
            "--service-cluster-ip-range=10.0.0.0/24",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            f"--audit-policy-file={self.folder / 'audit-policy.yaml'}",
            f"--audit-log-path={self.folder / 'audit.log'}",
        )
        self._until(lambda: self.api.is_ready())

    def _start(self, name: str, *arguments: str) -> None:
        binary = str(Path(os.environ["KUBEBUILDER_ASSETS"]) / name)
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen([binary, *arguments], stdout=log, stderr=subprocess.STDOUT)
        self._processes[name] = process
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)

    def _until(self, holds: Callable[[], Any]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(Refused, Unreachable):
                if holds():
                    return
            late, ended = time.monotonic() > deadline, [p for p in self._processes.values() if p.poll() is not None]
            if late or ended:
                logs = {log.name: log.read_text(errors="replace")[-2000:] for log in self.folder.glob("kube-*.log")}
                pytest.fail(
                    f"the control plane {'is not ready' if late else 'has ended'}: {json.dumps(logs, indent=1)}"
                )
            time.sleep(0.2)


def _address(version: str, plural: str = "", namespace: str | None = None, name: str = "") -> str:
    """`version` is an apiVersion: v1, batch/v1."""
    place = f"/namespaces/{namespace}" if namespace and plural not in CLUSTER_WIDE else ""
    parts = [f"/{'apis' if '/' in version else 'api'}/{version}{place}", plural, name]
    return "/".join(part for part in parts if part)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
