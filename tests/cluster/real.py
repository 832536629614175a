"""A real control plane in the fake's place: etcd, API server, controller-manager, scheduler, where KUBEBUILDER_ASSETS names
the folder of their binaries (the envtest convention). Nodes and pods are played by tests/cluster/kubelet.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import yaml

from launcher.cluster import Cluster, NotFound

BINARIES = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
PLURALS = {
    "configmaps": "ConfigMap",
    "jobs": "Job",
    "leases": "Lease",
    "namespaces": "Namespace",
    "networkpolicies": "NetworkPolicy",
    "pods": "Pod",
    "selectionruns": "SelectionRun",
    "services": "Service",
}
START_SECONDS = 90.0


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
        self.url = f"https://127.0.0.1:{_free_port()}"
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> RealServer:
        self.folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["openssl", "genrsa", "-out", str(self.folder / "sa.key"), "2048"], check=True, capture_output=True
        )
        (self.folder / "tokens.csv").write_text('admin,admin,1,"system:masters"\n')
        etcd, peer = (f"http://127.0.0.1:{_free_port()}" for _ in range(2))
        self._start(
            "etcd",
            f"--data-dir={self.folder / 'etcd'}",
            *(f"--{name}-urls={etcd}" for name in ("listen-client", "advertise-client")),
            *(f"--{name}-urls={peer}" for name in ("listen-peer", "initial-advertise-peer")),
            f"--initial-cluster=default={peer}",
        )
        self._start(
            "kube-apiserver",
            f"--etcd-servers={etcd}",
            f"--secure-port={self.url.rpartition(':')[2]}",
            "--bind-address=127.0.0.1",
            f"--cert-dir={self.folder / 'certificates'}",
            f"--token-auth-file={self.folder / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.0.0.0/24",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self.folder / 'sa.key'}",
            f"--service-account-signing-key-file={self.folder / 'sa.key'}",
        )
        kubeconfig = str(self.kubeconfig(self.folder / "kubeconfig"))
        os.environ["KUBECONFIG"], before = kubeconfig, os.environ.get("KUBECONFIG")
        self.client = Cluster(tries=5)
        if before is None:
            del os.environ["KUBECONFIG"]
        else:
            os.environ["KUBECONFIG"] = before
        self._until(lambda: bool(self.client.version()))
        key = f"--service-account-private-key-file={self.folder / 'sa.key'}"
        self._start(
            "kube-controller-manager", f"--kubeconfig={kubeconfig}", key, "--leader-elect=false", "--secure-port=0"
        )
        self._start("kube-scheduler", f"--kubeconfig={kubeconfig}", "--leader-elect=false", "--secure-port=0")
        self._until(lambda: self.client.find("ServiceAccount", "default", "default") is not None)
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def kubeconfig(self, path: Path, *, namespace: str = "default", token: str | None = None) -> Path:
        context = {"cluster": "real", "user": "real", "namespace": namespace}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "real",
            "clusters": [{"name": "real", "cluster": {"server": self.url, "insecure-skip-tls-verify": True}}],
            "users": [{"name": "real", "user": {"token": token or "admin"}}],
            "contexts": [{"name": "real", "context": context}],
        }
        path.write_text(yaml.safe_dump(document))
        return path

    def objects(self, plural: str, namespace: str | None = None) -> list[dict[str, Any]]:
        return self.client.list(PLURALS[plural], namespace).items

    def object(self, plural: str, name: str, namespace: str = "default") -> dict[str, Any] | None:
        return self.client.find(PLURALS[plural], namespace, name)

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        created = self.client.create(body)
        if body["kind"] == "CustomResourceDefinition":
            self._until(self.client.serves_selection_runs)
        return created

    def delete(self, plural: str, name: str, namespace: str = "default") -> None:
        self.client.delete(PLURALS[plural], namespace, name)

    def _start(self, name: str, *arguments: str) -> None:
        log = self.stack.enter_context((self.folder / f"{name}.log").open("wb"))
        binary = str(Path(os.environ["KUBEBUILDER_ASSETS"]) / name)
        process = subprocess.Popen([binary, *arguments], stdout=log, stderr=subprocess.STDOUT)
        self.stack.callback(process.wait)
        self.stack.callback(process.kill)

    def _until(self, holds: Any) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                if holds():
                    return
            except NotFound:
                pass
            except Exception:
                if time.monotonic() > deadline:
                    raise
            assert time.monotonic() < deadline, json.dumps(
                {log.name: log.read_text(errors="replace")[-2000:] for log in self.folder.glob("*.log")}, indent=1
            )
            time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
