"""Many runs in one operator: what they cost in requests, passes, memory and time, and what they cost once they are over.

`prism operator` and the API server (tests/cluster/server/apiserver.py) are processes of their own. This one creates
the runs, all at once, and plays the Job controller and the kubelet without any process: each new Job gets pods that
have succeeded, with the result of its stage, and is Complete. Three sizes show whether the cost of a run stays
the same. Nothing but the lease may be written while the runs are idle, nor by an operator that is started again.

    python -m benchmarks.operator_scale --runs 500 --json operator_scale.json
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import job
from launcher.kube.cluster import Cluster
from launcher.kube.errors import ClusterError
from launcher.resource.crd import crd
from launcher.resource.names import STAGE_LABEL
from launcher.resource.status import TERMINAL
from tests.cluster.kubelet.job_rules import TRACKING, job_to_pod
from tests.cluster.kubelet.mirror import stamp

ROOT = Path(__file__).parents[1]
Object = dict[str, Any]
Requests = Counter[tuple[str, str]]

MESSAGES: dict[str, Object] = {
    "plan": {"units": 4, "missing": 4, "examples": 16, "pairs": 3, "badRows": 0},
    "extract": {"units": 4},
    "reduce": {"manifest": "s3://scale/manifest.json", "selected": 4, "badRows": 0},
}
LEASE_WRITES = (("PUT", "leases"), ("POST", "leases"))
SETTLE_SECONDS = 5.0
PLAYERS = 4


def main() -> None:
    parser = job.parser(__doc__)
    parser.add_argument("--runs", type=int, default=500, help="of the largest size; a fifth and two fifths go before")
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--idle", type=float, default=60.0, help="seconds")
    chosen = parser.parse_args()
    figures: dict[str, Any] = {"groups": chosen.groups, "idle_seconds": chosen.idle}
    sizes = (max(1, chosen.runs // 5), max(1, 2 * chosen.runs // 5), chosen.runs)
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="operator-scale-") as folder:
            found = measure(Path(folder), size, chosen.groups, chosen.idle if size == sizes[-1] else 0.0)
        figures |= {f"{name}[{size}]": value for name, value in found.items()}
        for name, value in found.items():
            print(f"{f'{name}[{size}]':<44}{value}", flush=True)
    least, most = (figures[f"requests_a_run[{size}]"] for size in (sizes[0], sizes[-1]))
    figures["requests_a_run_growth"] = round(most / least, 3)
    grown = figures[f"rss_end_mb[{sizes[-1]}]"] - figures[f"rss_end_mb[{sizes[0]}]"]
    figures["kb_a_run"] = round(1024 * grown / (sizes[-1] - sizes[0]), 1) if sizes[-1] > sizes[0] else None
    print(f"{'requests_a_run_growth':<44}{figures['requests_a_run_growth']}\n{'kb_a_run':<44}{figures['kb_a_run']}")
    job.write_json(chosen.json, figures)
    invariants = {
        "idle runs are written to": figures[f"idle_writes[{sizes[-1]}]"] == 0,
        "a restart writes": figures[f"restart_writes[{sizes[-1]}]"] == 0,
        "requests a run grow with their number": figures["requests_a_run_growth"] < 1.2,
    }
    if violations := [what for what, holds in invariants.items() if not holds]:
        sys.exit(f"invariant violations: {'; '.join(violations)}")


def measure(folder: Path, size: int, groups: int, idle_seconds: float) -> dict[str, Any]:
    """One size, in a fresh cluster with a fresh operator."""
    with contextlib.ExitStack() as stack:
        server, operator = Server(folder, stack), Operator(folder, stack)
        first_mb = operator.memory("VmRSS")
        player = Player(stack)
        before = server.requests()
        started = time.monotonic()
        for number in range(size):
            player.count("POST", "selectionruns")
            player.cluster.create(document(f"run-{number:04}", groups))
        created_seconds = time.monotonic() - started
        player.wait_for_all_ended(size)
        seconds = time.monotonic() - started
        time.sleep(SETTLE_SECONDS)
        asked, figures = server.requests() - before - player.requests(), operator.figures()
        totals = {name: figures[f"prism_{name}_total"] for name in ("reconciles", "status_writes")}
        asked -= Counter({key: count for key, count in asked.items() if key[1] == "leases"})
        found = {
            "seconds": round(seconds, 1),
            "creation_seconds": round(created_seconds, 1),
            "cpu_seconds": round(operator.cpu_seconds(), 1),
            "requests": sum(asked.values()),
            "requests_a_run": round(sum(asked.values()) / size, 2),
            **{f"requests {method} {plural}": count for (method, plural), count in sorted(asked.items())},
            **{name: round(total) for name, total in totals.items()},
            **{f"{name}_a_run": round(total / size, 2) for name, total in totals.items()},
            "reconcile_failures": round(figures["prism_reconcile_failures_total"]),
            "rss_before_mb": first_mb,
            "rss_end_mb": operator.memory("VmRSS"),
            "rss_peak_mb": operator.memory("VmHWM"),
        }
        if idle_seconds:
            player.stop()
            found |= idle(server, operator, idle_seconds) | restart(server, operator, size)
        return found


def is_write(key: tuple[str, str]) -> bool:
    return key[0] not in ("GET", "LIST", "WATCH") and key not in LEASE_WRITES


def document(run: str, groups: int) -> Object:
    return {
        "apiVersion": "prism.dev/v1alpha1",
        "kind": "SelectionRun",
        "metadata": {"name": run, "namespace": "default"},
        "spec": {
            "model": {"uri": "s3://scale/model", "dtype": "bfloat16"},
            "candidates": {"uris": ["s3://scale/pool/"]},
            "targets": {"uris": ["s3://scale/targets.jsonl"]},
            "store": f"s3://scale/store/{run}",
            "output": "s3://scale/selections",
            "selection": {"keep": "highest", "budget": {"fraction": 0.3}},
            "cluster": {"image": "registry/prism@sha256:" + "0" * 64, "groups": groups},
        },
    }


class Server:
    """The API server's process."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        path = folder / "kubeconfig"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.server.apiserver", "--kubeconfig", str(path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        stack.callback(self.process.wait)
        stack.callback(self.process.kill)
        os.environ["KUBECONFIG"] = str(path)
        Cluster().create(crd())

    def requests(self) -> Requests:
        """All that were made so far, by (verb, plural)."""
        with urllib.request.urlopen(f"{self.url}/__requests", timeout=30) as answer:
            return Counter({(method, plural): count for method, plural, count in json.load(answer)["requests"]})


class Operator:
    """The process `prism operator`."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.log = folder / "operator.log"
        self.start()
        stack.callback(self.end)

    def start(self) -> None:
        command = [sys.executable, "-m", "launcher.cli.main", "operator", "--port", "0"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while '"leading"' not in self.log.read_text():
            time.sleep(0.1)
        self.port = json.loads(self.log.read_text().splitlines()[0])["port"]
        time.sleep(1.0)

    def end(self) -> None:
        """As a Deployment ends it: the lease is released."""
        self.process.terminate()
        self.process.wait(timeout=60)

    def figures(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as answer:
            lines = [line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    def memory(self, name: str) -> float:
        """MB of VmRSS or VmHWM."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return round(next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024, 1)

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Player:
    """Job controller and kubelet in one: every Job succeeds as soon as it is seen. Counts its own requests."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.cluster = Cluster()
        self.cluster.agent = "player"
        self.ended: set[str] = set()
        self.over = threading.Event()
        self._jobs: queue.SimpleQueue[Object | None] = queue.SimpleQueue()
        self._made: Requests = Counter()
        self._lock = threading.Lock()
        for kind, take in (("Job", self._jobs.put), ("SelectionRun", self._see)):
            threading.Thread(target=self._watch, args=(kind, take), daemon=True).start()
        for _ in range(PLAYERS):
            threading.Thread(target=self._play, daemon=True).start()
        stack.callback(self.stop)

    def stop(self) -> None:
        self.over.set()
        for _ in range(PLAYERS):
            self._jobs.put(None)

    def count(self, method: str, plural: str) -> None:
        with self._lock:
            self._made[method, plural] += 1

    def requests(self) -> Requests:
        with self._lock:
            return self._made.copy()

    def wait_for_all_ended(self, size: int) -> None:
        while len(self.ended) < size:
            time.sleep(0.1)

    def _see(self, record: Object) -> None:
        phase = (record.get("status") or {}).get("phase")
        if phase in TERMINAL and phase != "Complete":
            sys.exit(f"{record['metadata']['name']} ended {phase}: {record['status']['message']}")
        if phase == "Complete":
            self.ended.add(record["metadata"]["name"])

    def _watch(self, kind: str, take: Callable[[Object], object]) -> None:
        plural = "jobs" if kind == "Job" else "selectionruns"
        try:
            self.count("LIST", plural)
            version = self.cluster.list(kind, None).version
            while not self.over.is_set():
                self.count("WATCH", plural)
                for event, found in self.cluster.watch(kind, None, version):
                    version = found["metadata"]["resourceVersion"]
                    if event == "ADDED" or (event == "MODIFIED" and kind == "SelectionRun"):
                        take(found)
        except ClusterError:
            if not self.over.is_set():
                raise

    def _play(self) -> None:
        while (record := self._jobs.get()) is not None:
            try:
                self._complete(record)
            except ClusterError as error:
                print(f"{record['metadata']['name']}: {error}", file=sys.stderr)

    def _complete(self, record: Object) -> None:
        """Pods that have succeeded, then the Job's own status."""
        namespace, name, now = record["metadata"]["namespace"], record["metadata"]["name"], stamp(time.time())
        message = json.dumps(MESSAGES[record["metadata"]["labels"][STAGE_LABEL]])
        for index in range(record["spec"]["completions"]):
            pod = job_to_pod(record, index)
            pod["metadata"]["finalizers"].remove(TRACKING)
            self.count("POST", "pods")
            made = self.cluster.create(pod)
            ended = {"exitCode": 0, "reason": "Completed", "message": message, "startedAt": now, "finishedAt": now}
            container = {"name": "worker", "image": "", "imageID": "", "ready": False, "restartCount": 0}
            status = {"phase": "Succeeded", "containerStatuses": [{**container, "state": {"terminated": ended}}]}
            self.count("PATCH", "pods/status")
            self.cluster.patch("Pod", namespace, made["metadata"]["name"], {"status": status}, subresource="status")
        conditions = [
            {"type": kind, "status": "True", "reason": "CompletionsReached", "message": "", "lastTransitionTime": now}
            for kind in ("SuccessCriteriaMet", "Complete")
        ]
        status = {"conditions": conditions, "startTime": now, "completionTime": now, "succeeded": 1}
        self.count("PATCH", "jobs/status")
        self.cluster.patch("Job", namespace, name, {"status": status}, subresource="status")


def idle(server: Server, operator: Operator, seconds: float) -> dict[str, Any]:
    """Nothing happens to the runs: neither may they be written to."""
    time.sleep(2.0)
    before, cpu, passes = server.requests(), operator.cpu_seconds(), operator.figures()["prism_reconciles_total"]
    time.sleep(seconds)
    asked = server.requests() - before
    return {
        "idle_writes": sum(n for key, n in asked.items() if is_write(key)),
        "idle_lease_writes": sum(asked[key] for key in LEASE_WRITES),
        "idle_requests": sum(asked.values()),
        "idle_reconciles": round(operator.figures()["prism_reconciles_total"] - passes),
        "idle_cpu_seconds": round(operator.cpu_seconds() - cpu, 2),
    }


def restart(server: Server, operator: Operator, size: int) -> dict[str, Any]:
    """The operator is followed by another, which finds all runs ended."""
    operator.end()
    before, started = server.requests(), time.monotonic()
    operator.start()
    while operator.figures()["prism_reconciles_total"] < size:
        time.sleep(0.2)
    seconds = time.monotonic() - started
    time.sleep(SETTLE_SECONDS)
    asked = server.requests() - before
    return {
        "restart_writes": sum(n for key, n in asked.items() if is_write(key)),
        "restart_requests": sum(n for key, n in asked.items() if key[1] != "leases"),
        "restart_seconds": round(seconds, 1),
        "restart_rss_peak_mb": operator.memory("VmHWM"),
    }


if __name__ == "__main__":
    main()
