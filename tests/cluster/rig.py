"""A whole cluster for a test: API server, Job controller, kubelet, S3, and data for a small run. Knows no test."""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import yaml
from moto.server import ThreadedMotoServer

from launcher.kube.cluster import Cluster
from launcher.operator.controller import Controller
from launcher.reconcile.actions import Timeouts
from launcher.resource.crd import crd
from tests.cluster.accounts import Accounts
from tests.cluster.kubelet.job_controller import JobController
from tests.cluster.kubelet.kubelet import ONE_NODE, Kubelet
from tests.cluster.real import RealServer
from tests.cluster.server.apiserver import ApiServer
from tests.conftest import candidate, pair, write_jsonl
from tests.run_document import run_document

QUICK = Timeouts(backoff_seconds=0.1, max_backoff_seconds=1.0, lost_pod_seconds=5.0)
"""Waits of a test's controllers."""

BUCKET = "cluster"


NODES = dict.fromkeys(("node-a", "node-b"), ONE_NODE["node-a"])
"""Two, so that a pod has another place to go when one is lost."""


class Rig:
    """Everything that a run needs, on this machine. Use `rig()` to make one.

    `kubeconfig` is the administrator's, for the test's own set-up and looks. The launcher runs as a service account:
    `as_operator()`, `as_driver()`, `as_user()` and `as_viewer()` give the kubeconfigs of those.
    """

    def __init__(
        self, folder: Path, server: ApiServer | RealServer, kubelet: Kubelet, model: Path, environment: dict[str, str]
    ) -> None:
        self.folder, self.server, self.kubelet, self.model = folder, server, kubelet, model
        self.kubeconfig = server.kubeconfig(folder / "kubeconfig")
        self.accounts = Accounts(server, folder)
        self.as_operator, self.as_driver = self.accounts.as_operator, self.accounts.as_driver
        self.as_user, self.as_viewer = self.accounts.as_user, self.accounts.as_viewer
        self.environment = {**environment, "KUBECONFIG": str(self.kubeconfig)}
        self.place = f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}"  # moto's servers of one process share what they store
        self.client = boto3.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"], region_name="us-east-1", **KEYS)
        self.client.create_bucket(Bucket=BUCKET)
        self.upload(10)

    @property
    def is_real(self) -> bool:
        return isinstance(self.server, RealServer)

    def cluster(self, kubeconfig: Path | None = None, **options: Any) -> Cluster:
        """A client of this rig's API server; the administrator's, unless a kubeconfig is given."""
        with variables(KUBECONFIG=str(kubeconfig or self.kubeconfig)):
            return Cluster(**options)

    def upload(self, num_rows: int, name: str = "a.jsonl", first: int = 0) -> None:
        """Put a file of candidates into the pool; the targets too."""
        rows = write_jsonl(self.folder / "rows.jsonl", [candidate(first + number) for number in range(num_rows)])
        self.client.upload_file(str(rows), BUCKET, f"pool/{name}")
        targets = write_jsonl(self.folder / "targets.jsonl", [pair(number) for number in range(3)])
        self.client.upload_file(str(targets), BUCKET, "targets.jsonl")

    def document(self, name: str = "demo", **cluster: Any) -> dict[str, Any]:
        """A run over this rig's data that two CPU cores do in seconds."""
        small = {"image": "registry/prism@sha256:" + "0" * 64, "gpusPerNode": 0, "cpu": "100m", "memory": "64Mi"}
        document = run_document(name, bucket=BUCKET, **{**small, **cluster})
        document["spec"] |= {
            "model": {"uri": str(self.model), "dtype": "float32"},
            "store": f"{self.place}/store/{name}",
            "output": f"{self.place}/selections",
            "audit": {"examples": 0},
            "extraction": {
                "maxLength": 128,
                "examplesPerShard": 4,
                "projection": {"dim": 8},
                "codec": {"kind": "sign", "dims": 512},
            },
            "selection": {"keep": "highest", "budget": {"fraction": 0.3}},
        }
        return document

    def standin_document(self, name: str, seconds: float = 0.1, **cluster: Any) -> dict[str, Any]:
        """A run whose workers are stand-ins (standin.py), for tests of what starts and watches them: each starts at once, and
        each stage, and each unit of the extraction, lasts `seconds`."""
        env = {"STANDIN_RUN": name, "STANDIN_UNITS": "4", "STANDIN_SECONDS": str(seconds)}
        worker = {"name": "worker", "command": ["python", "-S", "-m", "tests.cluster.standin"]}
        given = {
            "env": [{"name": key, "value": value} for key, value in env.items()],
            "podOverlay": {"spec": {"containers": [worker]}},
        }
        return self.document(name, **given, **cluster)

    def let_hang(self, name: str, stage: str) -> None:
        """The stand-in that next starts a stage of this run does not end by itself."""
        orders = self.folder / "standins" / name / "orders"
        orders.mkdir(parents=True)
        (orders / f"{stage}.0").write_text("hang")

    def write(self, document: dict[str, Any]) -> Path:
        path = self.folder / f"{document['metadata']['name']}.yaml"
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        return path

    def get(self, uri: str) -> bytes:
        key = uri.removeprefix(f"s3://{BUCKET}/")
        return bytes(self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read())

    @contextlib.contextmanager
    def operator(self, **options: Any) -> Iterator[Controller]:
        """A controller over all runs, as the operator's account, in threads of this process."""
        controller = Controller(self.cluster(self.as_operator()), None, timeouts=QUICK, workers=2, **options)
        thread = threading.Thread(target=controller.run, daemon=True)
        thread.start()
        try:
            yield controller
        finally:
            controller.stop()
            thread.join(timeout=10)


KEYS = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}


@contextlib.contextmanager
def rig(
    folder: Path, model: Path, *, with_crd: bool = True, nodes: Any = None, real: bool = False, **kubelet_options: Any
) -> Iterator[Rig]:
    """A running cluster. `environment` of what is made points a command at it.

    Args:
        real: a real control plane; see `real.missing_binaries`.
        kubelet_options: further ones of `Kubelet`.
    """
    logs = folder / "logs"
    with contextlib.ExitStack() as stack:
        moto = ThreadedMotoServer(port=0, verbose=False)
        moto.start()
        stack.callback(moto.stop)
        host, port = moto.get_host_and_port()
        s3 = f"http://{host}:{port}"
        server = stack.enter_context(RealServer(folder / "control-plane") if real else ApiServer(log_folder=logs))
        kubeconfig = server.kubeconfig(folder / "rig-kubeconfig")
        if with_crd:
            server.create(crd())
        environment = {
            "AWS_ENDPOINT_URL": s3,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "STANDIN_FOLDER": str(folder / "standins"),
            "PYTHONPATH": str(Path(__file__).parents[2]),
            # Another kernel of OpenBLAS gives other last bits, and tests compare pods' bytes with those of processes of ours.
            **{name: value for name, value in os.environ.items() if name.startswith("OPENBLAS_")},
        }
        if not real:
            stack.enter_context(JobController(kubeconfig))
        kubelet = stack.enter_context(
            Kubelet(
                kubeconfig,
                folder / "pods",
                nodes=nodes or NODES,
                log_folder=logs,
                environment=environment,
                control_plane=server if isinstance(server, RealServer) else None,
                **kubelet_options,
            )
        )
        yield Rig(folder, server, kubelet, model, environment)


@contextlib.contextmanager
def variables(**wanted: str) -> Iterator[None]:
    """Environment variables, as they were afterwards."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def eventually(holds: Callable[[], Any], seconds: float = 120.0) -> Any:
    """Wait until something holds, and return it; an assertion error with the last answer after so long."""
    import time

    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, f"not so within {seconds} s: {found!r}"
        time.sleep(0.05)
    return found
