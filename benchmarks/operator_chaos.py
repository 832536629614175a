"""Runs under failures: API faults, operators that die, pods and nodes that are lost; each run must end as predicted.

Rounds, faults and invariants: docs/reliability.md. The cluster is that of tests/cluster; its pods are processes that behave
like workers (tests/cluster/standin.py), and the first `--real` rounds run the real worker over moto's S3. Exits non-zero,
with the history of each such run, where an invariant is violated.

    python benchmarks/operator_chaos.py --rounds 200 --seed 1 --json operator_chaos.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import job
from launcher.kube.cluster import Cluster
from launcher.operator.controller import Controller
from launcher.reconcile.actions import Timeouts
from launcher.resource.crd import crd
from launcher.resource.names import CANCEL_ANNOTATION, RUN_LABEL
from launcher.resource.status import TERMINAL
from tests.cluster.kubelet.job_controller import JobController
from tests.cluster.kubelet.kubelet import Kubelet
from tests.cluster.server.apiserver import ApiServer
from tests.cluster.server.refusals import ApiError
from tests.cluster.witness import Account, Witness

Object = dict[str, Any]

QUICK = Timeouts(backoff_seconds=0.1, max_backoff_seconds=1.0, lost_pod_seconds=5.0, pod_status_seconds=3.0)
"""Waits of the operators in this process; `prism operator` has its own."""

FAULT_KINDS = ("429", "500", "503", "409", "reset_before", "reset_after", "delay")
FAULT_RATES = {
    "none": {},
    "some": dict(zip(FAULT_KINDS, (0.01, 0.02, 0.01, 0.02, 0.01, 0.02, 0.03), strict=True)),
    "many": dict(zip(FAULT_KINDS, (0.04, 0.04, 0.04, 0.05, 0.04, 0.05, 0.05), strict=True)),
}
WATCH_FAULTS = {"drop_watch": 0.3, "gone_watch": 0.15}
"""Beside those above, unless there are none."""

END_SECONDS, REAL_END_SECONDS = 150.0, 300.0
"""A round that takes longer counts as hanging."""

QUIET_SECONDS = 1.5
"""An ended run is watched this long: nothing may happen to it any more."""

GONE_SECONDS = 60.0
"""A deleted run's children are gone after this long, in which a lost node comes back."""

HARMS = ("kill", "terminate", "oom", "evict", "delete_job")
SCENARIOS = (
    *("calm", "harmed", "harmed", "harmed", "exits", "exits", "both", "suspended", "retried mid-run"),
    *("wrong", "damaged", "exhausted", "imageless", "retried", "cancelled", "deleted"),
)
PLACES = ("jobs", "pods", "services", "configmaps", "networkpolicies")
ENDED = ("Complete", "Failed")
"""Types of the conditions of a run, or of a Job, that has ended."""


@dataclass(frozen=True)
class Scenario:
    """What happens to a run, and how it must end.

    Attributes:
        ends: phase, or `Deleted`.
        reason: of its Failed condition.
        harms: (seconds after the one before, what).
        orders: what its workers do, by file name (standin.py).
        again: at the end its orders are removed and `spec.retry` is raised: it must then complete.
    """

    name: str
    ends: str = "Complete"
    reason: str = "Complete"
    harms: tuple[tuple[float, str], ...] = ()
    orders: dict[str, str] = field(default_factory=dict)
    again: bool = False
    cluster: dict[str, Any] = field(default_factory=dict)


def draw_scenario(seed: int, number: int) -> Scenario:
    """The scenario of one round: the same for the same seed."""
    chance = random.Random(f"{seed} {number}")
    shape = {"groups": chance.choice((1, 1, 2)), "nodesPerGroup": chance.choice((1, 1, 1, 2)), "maxRestarts": 12}
    stage = chance.choice(("plan", "extract", "extract", "reduce"))
    mid = chance.uniform(0.2, 2.0)
    some = tuple((chance.uniform(0.0, 1.5), chance.choice(HARMS)) for _ in range(chance.randint(1, 4)))
    exits = {
        f"{chance.choice(('plan', 'extract', 'reduce'))}.{place}": chance.choice(("1", "75")) for place in range(3)
    }
    name = chance.choice(SCENARIOS)
    drawn = partial(Scenario, name, cluster=shape)

    def always(order: str) -> dict[str, str]:
        return {f"{stage}.always": order}

    match name:
        case "calm":
            return drawn()
        case "harmed":
            return drawn(harms=some)
        case "exits":
            return drawn(orders=exits)
        case "both":
            return drawn(harms=some, orders=exits)
        case "suspended":
            return drawn(harms=((mid, "suspend"), (chance.uniform(0.5, 2.0), "resume"), *some[:1]))
        case "wrong":
            return drawn("Failed", "WrongRequest", orders=always("64"))
        case "damaged":
            return drawn("Failed", "DamagedData", orders=always("65"))
        case "exhausted":
            return drawn("Failed", "TooManyRestarts", orders=always("1"), cluster={**shape, "maxRestarts": 2})
        case "cancelled":
            return drawn("Cancelled", "Cancelled", harms=((mid, "cancel"),), orders=always("hang"))
        case "deleted":
            return drawn("Deleted", harms=((mid, "delete"),), orders=always("hang"))
        case "retried":
            return drawn("Failed", "WrongRequest", orders=always("64"), again=True)
        case "retried mid-run":
            return drawn(harms=((mid, "retry"),))
    image = {"image": "registry/no-such-image:1", "startupTimeoutSeconds": 10}
    return drawn("Failed", "StartupTimeout", cluster={**shape, **image})


def real_scenario(seed: int, number: int) -> Scenario:
    """For a round of real workers: harmed, or a wrong request."""
    chance = random.Random(f"{seed} {number} real")
    if number % 4 == 3:
        return Scenario("real wrong", "Failed", "WrongRequest", cluster={"maxRestarts": 12})
    some = tuple((chance.uniform(1.0, 4.0), chance.choice(HARMS)) for _ in range(2))
    return Scenario("real harmed", harms=some, cluster={"maxRestarts": 12, "groups": chance.choice((1, 2))})


class Killed(BaseException):
    """Ends an operator; no handler of its own catches it."""


class DyingCluster(Cluster):
    """A client whose operator dies after a number of requests: before or after the last one was made."""

    def __init__(self, num_requests: float, chance: random.Random) -> None:
        super().__init__()
        self.left, self.chance = num_requests, chance
        self.dead = threading.Event()
        self.die: Callable[[], None] = lambda: None

    def _send(self, *arguments: Any) -> Any:
        if self.dead.is_set():
            raise Killed
        self.left -= 1
        if self.left > 0:
            return super()._send(*arguments)
        if self.chance.random() < 0.5:
            with contextlib.suppress(Exception):
                super()._send(*arguments).read()
        self.dead.set()
        self.die()
        raise Killed

    def watch(self, *arguments: Any, **options: Any) -> Iterator[tuple[str, Object]]:
        for event in super().watch(*arguments, **options):
            if self.dead.is_set():
                raise Killed
            yield event


class Operators:
    """Operators come and go, by themselves and two at once, as threads and as processes."""

    KINDS = (["thread"], ["thread"], ["thread"], ["thread", "thread"], ["thread", "process"], ["process", "process"])
    """Which operators run at a time, drawn from these."""

    def __init__(self, folder: Path, environment: dict[str, str], seed: int) -> None:
        self.folder, self.environment, self.chance = folder, environment, random.Random(f"{seed} operators")
        self.ends: Counter[str] = Counter()
        self.over = threading.Event()
        self.tracebacks: list[str] = []
        self._thread = threading.Thread(target=self._replace_operators, daemon=True)
        threading.excepthook = _ignore_killed

    def __enter__(self) -> Operators:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._thread.join(timeout=60)

    def log(self, **fields: Any) -> None:
        """A traceback in a log line is a bug."""
        if "Traceback" in str(fields.get("error", "")):
            self.tracebacks.append(str(fields["error"]))

    def _replace_operators(self) -> None:
        while not self.over.is_set():
            kinds = self.chance.choice(self.KINDS)
            self.ends[" and ".join(kinds)] += 1
            seconds = self.chance.uniform(18, 30) if kinds == ["process", "process"] else self.chance.uniform(2, 10)
            with contextlib.ExitStack() as stack:
                alive = [
                    stack.enter_context(self._process() if kind == "process" else self._operator_thread())
                    for kind in kinds
                ]
                until = time.monotonic() + seconds
                while any(one() for one in alive) and time.monotonic() < until:
                    if self.over.wait(0.1):
                        break
            self.over.wait(self.chance.uniform(0, 1.0))

    @contextlib.contextmanager
    def _operator_thread(self) -> Iterator[Callable[[], bool]]:
        """An operator that may die early. Yields whether it still lives."""
        lives = self.chance.choice((20, 60, 150, 400, float("inf")))
        cluster = DyingCluster(lives * self.chance.uniform(0.3, 1.0), self.chance)
        controller = Controller(cluster, None, timeouts=QUICK, workers=2, log=self.log)
        cluster.die = controller.stop
        thread = threading.Thread(target=controller.run, daemon=True)
        thread.start()
        try:
            yield lambda: not cluster.dead.is_set()
        finally:
            self.ends["thread: " + ("dead between two requests" if cluster.dead.is_set() else "stopped")] += 1
            controller.stop()
            thread.join(timeout=10)
            cluster.dead.set()  # its watches end too

    @contextlib.contextmanager
    def _process(self) -> Iterator[Callable[[], bool]]:
        number = self.chance.choice((signal.SIGKILL, signal.SIGTERM))
        command = [sys.executable, "-m", "launcher.cli.main", "operator", "--port", "0"]
        path = self.folder / f"operator-{sum(self.ends.values())}.log"
        with path.open("wb") as log:
            process = subprocess.Popen(command, env=self.environment, cwd=ROOT, stdout=log, stderr=log)
        # Where two wait for one lease, the second must then lead.
        early = threading.Timer(self.chance.uniform(3, 15), process.send_signal, (number,))
        early.start()
        try:
            yield lambda: process.poll() is None
        finally:
            early.cancel()
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
            self.ends[f"process: {number.name}"] += 1
            try:
                process.wait(timeout=35)  # SIGTERM lets a request end
            except subprocess.TimeoutExpired:
                self.tracebacks.append("an operator did not end on SIGTERM")
                process.kill()
                process.wait()
            self.tracebacks += [line for line in path.read_text().splitlines() if "Traceback" in line]


class Faults:
    """Failed requests, broken watches, outages of the API server, lost nodes: another every few seconds."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig, self.chance, self.seed = rig, random.Random(f"{seed} faults"), seed
        self.counts: Counter[str] = Counter()
        self.over = threading.Event()
        self._threads = [threading.Thread(target=one, daemon=True) for one in (self._api, self._nodes)]

    def __enter__(self) -> Faults:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self._threads:
            thread.join(timeout=30)
        self.rig.server.faults.clear()

    def _api(self) -> None:
        server, number = self.rig.server, 0
        while not self.over.is_set():
            number += 1
            kind = self.chance.choice(("none", "some", "some", "many"))
            shares = {**FAULT_RATES[kind], **(WATCH_FAULTS if kind != "none" else {})}
            server.faults.rain(shares, seed=self.seed * 1000 + number, only="prism", delay_seconds=0.3)
            self.over.wait(self.chance.uniform(2, 6))
            event = self.chance.choice(("", "", "drop_watches", "compact", "outage"))
            if event:
                self.counts[event] += 1
            if event == "outage":
                with server.outage():
                    self.over.wait(self.chance.uniform(0.2, 2.0))
            elif event:
                getattr(server, event)()

    def _nodes(self) -> None:
        names = self.rig.nodes[:]
        while not self.over.wait(self.chance.uniform(8, 20)):
            how = self.chance.choice(("lost", "frozen", "deleted"))
            if how == "deleted" and len(names) <= len(self.rig.nodes) // 2:
                how = "lost"
            busy = [name for name in names if self.rig.pods_on(name)] or names
            name = self.chance.choice(busy)
            self.counts[f"node {how}"] += 1
            self.rig.blame(name, deleted=how == "deleted")
            try:
                if how == "deleted":
                    names.remove(name)
                    self.rig.kubelet.delete_node(name)
                    for _ in range(30):  # until its pods are collected, and those that were on their way to it
                        self.rig.blame(name, deleted=True)
                        time.sleep(0.1)
                else:
                    self.rig.kubelet.lose_node(name, freeze=how == "frozen")
                    self.over.wait(self.chance.uniform(2, 8))
            finally:
                if how != "deleted":
                    self.rig.blame(name)
                    self.rig.kubelet.return_node(name)


class Rig:
    """The cluster, and what the rounds need of it."""

    def __init__(self, folder: Path, chosen: argparse.Namespace, stack: contextlib.ExitStack) -> None:
        self.folder, self.chosen = folder, chosen
        self.server = stack.enter_context(ApiServer(log_folder=folder / "logs"))
        self.server.reading.bookmark_seconds = 2.0  # a dead operator's watches end with the next
        self.server.create(crd())
        self.kubeconfig = self.server.kubeconfig(folder / "kubeconfig")
        os.environ["KUBECONFIG"] = str(self.kubeconfig)
        self.environment = {"STANDIN_FOLDER": str(folder / "work"), "PYTHONPATH": str(ROOT)}
        self.environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if chosen.real:
            self._prepare_real(stack)
        self.nodes = [f"node-{number:02}" for number in range(16)]
        capacity = {"cpu": "500m", "memory": "64Gi"}
        self.witness = Witness(self.server)
        stack.enter_context(JobController(self.kubeconfig))
        places = {"nodes": dict.fromkeys(self.nodes, capacity), "log_folder": folder / "logs"}
        kubelet = Kubelet(self.kubeconfig, folder / "pods", environment=self.environment, **places)
        self.kubelet = stack.enter_context(kubelet)
        self.kubelet.missing_images.add("registry/no-such-image:1")
        self.blamed: Counter[str] = Counter()
        """Run -> harms done to it: so many attempts it may have had for them."""
        self.victims: set[str] = set()
        """Pods that a node's loss was blamed for."""

    def _prepare_real(self, stack: contextlib.ExitStack) -> None:
        import boto3
        from moto.server import ThreadedMotoServer

        from tests.conftest import candidate, pair, write_jsonl
        from tests.models import save_tiny_model

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        moto = ThreadedMotoServer(port=0, verbose=False)
        moto.start()
        stack.callback(moto.stop)
        host, port = moto.get_host_and_port()
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
        self.environment |= {"AWS_ENDPOINT_URL": f"http://{host}:{port}", **keys}
        save_tiny_model(self.folder / "model")
        secrets = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1", **secrets)
        client.create_bucket(Bucket="chaos")
        rows = write_jsonl(self.folder / "rows.jsonl", [candidate(number) for number in range(10)])
        client.upload_file(str(rows), "chaos", "pool/a.jsonl")
        targets = write_jsonl(self.folder / "targets.jsonl", [pair(number) for number in range(3)])
        client.upload_file(str(targets), "chaos", "targets.jsonl")

    def document(self, run: str, scenario: Scenario, units: int, seconds: float) -> Object:
        """A run of stand-ins, or of real workers."""
        is_real = scenario.name.startswith("real")
        model = str(self.folder / "model") if scenario.name != "real wrong" else "/nowhere"
        env = {"STANDIN_RUN": run, "STANDIN_UNITS": str(units), "STANDIN_SECONDS": f"{seconds:.2f}"}
        command = ["python", "-S", "-m", "tests.cluster.standin"]
        cluster = {
            "image": "registry/prism@sha256:" + "0" * 64,
            "gpusPerNode": 0,
            "cpu": "100m",
            "memory": "64Mi",
            "env": [{"name": name, "value": value} for name, value in env.items()],
            **({} if is_real else {"podOverlay": {"spec": {"containers": [{"name": "worker", "command": command}]}}}),
            **scenario.cluster,
        }
        rows: Object = {"projection": {"dim": 8}, "codec": {"kind": "sign", "dims": 512}}
        return {
            "apiVersion": "prism.dev/v1alpha1",
            "kind": "SelectionRun",
            "metadata": {"name": run, "namespace": "default"},
            "spec": {
                "model": {"uri": model, "dtype": "float32"},
                "candidates": {"uris": ["s3://chaos/pool/"]},
                "targets": {"uris": ["s3://chaos/targets.jsonl"]},
                "store": f"s3://chaos/store/{run}",
                "output": "s3://chaos/selections",
                "extraction": {"maxLength": 128, "examplesPerShard": 4, **rows},
                "selection": {"keep": "highest", "budget": {"fraction": 0.3}},
                "cluster": cluster,
            },
        }

    def edit(self, run: str, change: Callable[[Object], None]) -> None:
        """Change a record by hand, as kubectl would; nothing where it is gone."""
        with self.server.store.lock, contextlib.suppress(ApiError):
            there = self.server.object("selectionruns", run)
            if there is not None:
                change(there)
                self.server.update(there)

    def pods_on(self, node: str, *, deleted: bool = False) -> list[tuple[str, str]]:
        """(run, pod) of the pods that run there; also of ended ones where their termination messages go with the node."""
        over = () if deleted else ("Succeeded", "Failed")
        return [
            (run, name)
            for run, account in list(self.witness.accounts.items())
            for name, pod in list(account.pods.items())
            if pod["spec"].get("nodeName") == node and pod.get("status", {}).get("phase") not in over
        ]

    def blame(self, node: str, *, deleted: bool = False) -> None:
        """A node's loss may cost each run an attempt for each pod there."""
        for run, pod in self.pods_on(node, deleted=deleted):
            if pod not in self.victims:
                self.victims.add(pod)
                self.blamed[run] += 1

    def children(self, run: str | None = None) -> list[str]:
        """What is there of one run, or of all: `jobs/r001-plan-0-0` …"""
        return [
            f"{plural}/{one['metadata']['name']}"
            for plural in PLACES
            for one in self.server.objects(plural, "default")
            if (found := (one["metadata"].get("labels") or {}).get(RUN_LABEL)) and run in (None, found)
        ]

    def processes(self) -> list[int]:
        """Processes of pods that still run."""
        mark = f"STANDIN_FOLDER={self.environment['STANDIN_FOLDER']}".encode()
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found


class Round:
    """One run from its record's making to the last trace of it."""

    def __init__(self, rig: Rig, seed: int, number: int) -> None:
        self.rig, self.number, self.run = rig, number, f"r{number:03}"
        is_real = number < rig.chosen.real
        self.scenario = (real_scenario if is_real else draw_scenario)(seed, number)
        self.chance = random.Random(f"{seed} {number} times")
        self.num_units = self.chance.randint(3, 8)
        self.end_seconds = REAL_END_SECONDS if is_real else END_SECONDS
        self.home = rig.folder / "work" / self.run
        self.harms: Counter[str] = Counter()
        self.violations: list[str] = []
        self.seconds = 0.0

    @property
    def account(self) -> Account:
        return self.rig.witness.accounts[self.run]

    def play(self) -> Round:
        started = time.monotonic()
        orders = self.home / "orders"
        orders.mkdir(parents=True)
        for name, order in self.scenario.orders.items():
            (orders / name).write_text(order)
        seconds = self.chance.uniform(0.05, 0.25)
        self.rig.server.create(self.rig.document(self.run, self.scenario, self.num_units, seconds))
        for wait_seconds, harm in self.scenario.harms:
            time.sleep(wait_seconds)
            self.harm(harm)
        round_number = int(self.harms["retry"])
        if self.scenario.ends != "Deleted" and self.wait_for_end(round_number):
            self.judge(self.scenario.ends, self.scenario.reason)
            if self.scenario.again:
                for order in orders.iterdir():
                    order.unlink()
                self.harm("retry")
                if self.wait_for_end(1):
                    self.judge("Complete", "Complete")
        self.seconds = time.monotonic() - started
        self.remove()
        self.judge_attempts()
        self.violations += self.account.violations
        return self

    def wait_for_end(self, round_number: int) -> bool:
        """Of that round; and a little longer, in which nothing may happen any more."""
        deadline = time.monotonic() + self.end_seconds
        while self.account.phase not in TERMINAL or self.account.status.get("round") != round_number:
            if time.monotonic() > deadline:
                status = json.dumps(self.account.status)[:2000]
                self.violations.append(f"not ended after {self.end_seconds} s: {status}")
                return False
            time.sleep(0.05)
        time.sleep(QUIET_SECONDS)
        if self.chance.random() < 0.3:  # what an ended run left is nobody's business any more
            self.delete_job(any_state=True)
            time.sleep(QUIET_SECONDS)
        return True

    def harm(self, what: str) -> None:
        """Done once there is something to do it to; not at all to a run that has ended before."""
        actions: dict[str, Callable[[], bool]] = {
            "kill": lambda: self.strike(lambda pod: self.rig.kubelet.kill("default", pod)),
            "terminate": lambda: self.strike(lambda pod: self.rig.kubelet.kill("default", pod, signal.SIGTERM)),
            "oom": lambda: self.strike(lambda pod: self.rig.kubelet.oom_kill("default", pod)),
            "evict": lambda: self.strike(lambda pod: self.rig.kubelet.evict("default", pod)),
            "delete_job": self.delete_job,
            "suspend": lambda: self.edit(lambda record: record["spec"].update(suspend=True)),
            "resume": lambda: self.edit(lambda record: record["spec"].update(suspend=False)),
            "retry": lambda: self.edit(lambda record: record["spec"].update(retry=1)),
            "cancel": lambda: self.edit(lambda record: record["metadata"].update(annotations={CANCEL_ANNOTATION: "0"})),
            "delete": self.delete_record,
        }
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and (self.account.phase not in TERMINAL or what == "retry"):
            if actions[what]():
                self.harms[what] += 1
                return
            time.sleep(0.03)

    def strike(self, blow: Callable[[str], None]) -> bool:
        pods = self.rig.witness.running(self.run)
        if not pods:
            return False
        self.rig.blamed[self.run] += 1
        try:
            blow(self.chance.choice(pods))
        except Exception:  # it ended meanwhile
            self.rig.blamed[self.run] -= 1
            return False
        return True

    def delete_job(self, any_state: bool = False) -> bool:
        names = [key for key in self.rig.children(self.run) if key.startswith("jobs/")]
        for name in names:
            there = self.rig.server.object("jobs", name.partition("/")[2])
            conditions = (there or {}).get("status", {}).get("conditions") or ()
            if there and (any_state or not any(one["type"] in ENDED for one in conditions)):
                self.rig.blamed[self.run] += 1
                with contextlib.suppress(ApiError):
                    self.rig.server.delete("jobs", there["metadata"]["name"])
                    return True
        return False

    def edit(self, change: Callable[[Object], None]) -> bool:
        self.rig.edit(self.run, change)
        return True

    def delete_record(self) -> bool:
        self.rig.server.delete("selectionruns", self.run)
        return True

    def judge(self, phase: str, reason: str) -> None:
        status = self.account.status
        ended = [one for one in status["conditions"] if one["status"] == "True" and one["type"] in ENDED]
        reasons = [one["reason"] for one in ended]
        if (status["phase"], reasons) != (phase, [reason]):
            self.violations.append(f"ended {status['phase']} {reasons}, not {phase} {reason}")
        if status["phase"] == "Complete" and not self.scenario.name.startswith("real"):
            there = sum((self.home / "units" / str(unit)).exists() for unit in range(self.num_units))
            if there != self.num_units or status.get("units") != self.num_units:
                units = f"{there} of {self.num_units} units; the status has {status.get('units')}"
                self.violations.append(f"Complete with {units}")
            if not (self.home / "manifest.json").exists():
                self.violations.append("Complete without a manifest")

    def judge_attempts(self) -> None:
        """Every attempt after a stage's first has its cause: a harm, an order, a suspension."""
        orders = len([name for name in self.scenario.orders if not name.endswith("always")])
        rounds = {place[0] for place in self.account.jobs}
        always = self.scenario.cluster.get("maxRestarts", 0) * self.scenario.cluster.get("groups", 1)
        causes = self.rig.blamed[self.run] + orders + (always if self.scenario.name == "exhausted" else 0)
        # A stage that ended well, but not in the status yet, is begun again too where a suspension comes between.
        causes += self.harms["suspend"] * (self.scenario.cluster.get("groups", 1) + 1)
        found = sum(count - 1 for count in self.account.jobs.values())
        if found > causes:
            self.violations.append(f"{found} attempts after the first in {len(rounds)} round(s), for {causes} causes")

    def remove(self) -> None:
        with contextlib.suppress(ApiError):
            self.delete_record()
        deadline = time.monotonic() + GONE_SECONDS
        while left := self.rig.children(self.run):
            if time.monotonic() > deadline:
                self.violations.append(f"left behind: {', '.join(left)}")
                return
            time.sleep(0.3)

    def report(self, seed: int) -> str:
        """The scenario, what was observed, and which invariants were violated."""
        head = (f"round {self.number} (seed {seed}), {self.scenario}", f"harms: {dict(self.harms)}")
        return "\n  ".join([*head, *self.account.lines(), *(f"VIOLATED: {one}" for one in self.violations)])


def run(folder: Path, chosen: argparse.Namespace, stack: contextlib.ExitStack) -> tuple[dict[str, Any], list[str]]:
    """All rounds: (figures, invariant violations)."""
    started = time.monotonic()
    rig = Rig(folder, chosen, stack)
    environment = {**os.environ, **rig.environment, "KUBECONFIG": str(rig.kubeconfig)}
    operators = Operators(folder, environment, chosen.seed)
    faults = Faults(rig, chosen.seed)
    with ThreadPoolExecutor(chosen.at_once) as pool, operators, faults:
        made = [Round(rig, chosen.seed, number) for number in range(chosen.rounds)]
        rounds = []
        for one in pool.map(Round.play, made):
            rounds.append(one)
            if len(rounds) % 20 == 0:
                num_violating = sum(bool(one.violations) for one in rounds)
                print(f"{len(rounds)} rounds, {num_violating} violations", file=sys.stderr, flush=True)
    violations = [one.report(chosen.seed) for one in rounds if one.violations]
    violations += [f"a bug in an operator: {one}" for one in operators.tracebacks]
    left, processes = rig.children(), rig.processes()
    if left or processes:
        violations.append(f"left at the end: {left}, processes {processes}")
    scenarios, harms = Counter(one.scenario.name for one in rounds), sum((one.harms for one in rounds), Counter())
    attempts = [one for one in rounds if one.scenario.ends == "Complete"]
    figures = {
        "rounds": len(rounds),
        "seed": chosen.seed,
        "invariant_violations": len(violations),
        **{f"scenarios[{name}]": count for name, count in sorted(scenarios.items())},
        "harms": sum(harms.values()),
        **{f"harms[{name}]": count for name, count in sorted(harms.items())},
        "requests": sum(rig.server.requests.values()),
        "faults": sum(rig.server.faults.counts.values()),
        **{f"faults[{name}]": count for name, count in sorted(rig.server.faults.counts.items())},
        **{f"cluster_faults[{name}]": count for name, count in sorted(faults.counts.items())},
        **{f"operators[{name}]": count for name, count in sorted(operators.ends.items())},
        "jobs": sum(sum(one.account.jobs.values()) for one in rounds),
        "overlaps": len(rig.witness.overlaps),
        "longest_overlap_seconds": round(max(rig.witness.overlaps.values(), default=0.0), 2),
        "round_seconds_median": round(statistics.median(one.seconds for one in attempts or rounds), 1),
        "round_seconds_longest": round(max(one.seconds for one in rounds), 1),
        "seconds": round(time.monotonic() - started, 1),
    }
    return figures, violations


def _ignore_killed(arguments: threading.ExceptHookArgs) -> None:
    if not isinstance(arguments.exc_value, Killed):
        sys.__excepthook__(arguments.exc_type, arguments.exc_value or Killed(), arguments.exc_traceback)


def main() -> None:
    parser = job.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--real", type=int, default=0, help="so many rounds, the first, have real workers")
    parser.add_argument("--at-once", type=int, default=12, help="rounds in flight")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="operator-chaos-") as folder, contextlib.ExitStack() as stack:
        figures, violations = run(Path(folder), chosen, stack)
        for name, value in figures.items():
            print(f"{name:<44}{value}")
        job.write_json(chosen.json, figures)
    if violations:
        sys.exit("\n".join(["invariant violations:", *violations]))


if __name__ == "__main__":
    main()
