"""What random kills cost: ranks, spawners, whole groups and the reducer are killed during a run over S3.

Two groups of ranks extract many small units of a tiny model over moto's S3 server (real HTTP, every response delayed, so that
units are unfinished when something is killed). What was killed is started again, as a Job controller would. With --faults, a
share of the requests fails as well. Exits non-zero where an invariant of docs/reliability.md is violated.

    python benchmarks/chaos.py --kills 60 --seed 1 --json chaos.json
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import job
from tests.conftest import candidate, pair, write_jsonl
from tests.models import save_tiny_model
from tests.unreliable_proxy import UnreliableProxy

ROWS_PER_UNIT = 2
SHARD_TIMEOUT_SECONDS = 60
"""A kill waits for a new shard, but no longer than this: what is restarted must make progress between two kills."""

REDUCER_SHARE = 0.1
"""Share of the kills that hit the reducer."""


def main() -> None:
    parser = job.parser(__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--units", type=int, default=500)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2, help="of a group")
    parser.add_argument("--faults", type=float, default=0.0, help="share of requests that fail")
    parser.add_argument("--latency", type=float, default=0.3, help="seconds by which every response is delayed")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, contextlib.ExitStack() as stack:
        figures = Chaos(Path(folder), chosen, stack).run()
    for name, value in figures.items():
        print(f"{name:<28}{value}")
    job.write_json(chosen.json, figures)
    if not figures["same_bytes"] or figures["quarantined"] or figures["recomputed"] > figures["recomputed_allowed"]:
        sys.exit("an invariant is violated")


class Chaos:
    """A run with kills beside an undisturbed one."""

    def __init__(self, folder: Path, chosen: argparse.Namespace, stack: contextlib.ExitStack) -> None:
        self.folder, self.chosen, self.random = folder, chosen, random.Random(chosen.seed)
        self.logs: list[Path] = []
        self.kills: Counter[str] = Counter()
        save_tiny_model(folder / "model")
        write_jsonl(folder / "pool.jsonl", [candidate(number) for number in range(chosen.units * ROWS_PER_UNIT)])
        write_jsonl(folder / "targets.jsonl", [pair(number) for number in range(3)])
        self.server = address = start_moto(folder / "moto.log", stack)
        slow = UnreliableProxy(address, 1.0, 0, kinds=("delay",), delay_seconds=chosen.latency)
        self.proxy = stack.enter_context(slow)
        if chosen.faults:
            self.proxy = stack.enter_context(UnreliableProxy(self.proxy.url, chosen.faults, chosen.seed))
        self.environment = {
            **os.environ,
            "AWS_ENDPOINT_URL": self.proxy.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        subprocess.run(
            [sys.executable, "-c", "import boto3; boto3.client('s3').create_bucket(Bucket='chaos')"],
            env={**self.environment, "AWS_ENDPOINT_URL": address},
            check=True,
        )

    def run(self) -> dict[str, Any]:
        started = time.monotonic()
        calm = self.spec("calm")
        late, self.environment["AWS_ENDPOINT_URL"] = self.proxy.url, self.server
        for stage in ("plan", "extract", "reduce"):
            self.finish(self.start(stage, calm), f"undisturbed {stage}")
        self.environment["AWS_ENDPOINT_URL"] = late
        wanted = self.outcome(self.logs[-1])
        calm_logs, self.logs = self.logs, []
        calm_seconds = time.monotonic() - started

        started = time.monotonic()
        wild = self.spec("wild")
        self.finish(self.start("plan", wild), "plan")
        plan = events(self.logs[-1])[-1]
        for_reducer = round(self.chosen.kills * REDUCER_SHARE)
        self.extract(wild, self.chosen.kills - for_reducer)
        reducer_log = self.reduce(wild, for_reducer)
        found = self.outcome(reducer_log)

        written: Counter[str] = Counter()
        for log in self.logs:
            put = [one for one in events(log) if one["event"] == "shard" and one["kind"] != "factors"]
            written.update(f"{one['extractor']}/{one['unit']}" for one in put)
        num_kills = sum(self.kills.values())
        return {
            "units": plan["units"],
            "kills": num_kills,
            **{f"kills[{name}]": count for name, count in sorted(self.kills.items())},
            "groups": self.chosen.groups,
            "ranks": self.chosen.ranks,
            "same_bytes": found["selected"] == wanted["selected"],
            "quarantined": found["quarantined"],
            "recomputed": sum(written.values()) - len(written),
            # Beside the kills, groups that help each other at the end may compute the same unit.
            "recomputed_allowed": (num_kills + 1) * self.chosen.ranks * self.chosen.groups,
            "requests": self.proxy.counts["requests"],
            "faults": self.proxy.num_faults,
            "retries": sum(one.get("retries", 0) for log in [*calm_logs, *self.logs] for one in events(log)[-1:]),
            "undisturbed_seconds": round(calm_seconds, 1),  # by one process, with no delays
            "seconds": round(time.monotonic() - started, 1),
        }

    def spec(self, name: str) -> Path:
        extraction = {"projection": {"dim": 8}, "codec": {"kind": "sign", "dims": 512}}
        spec = {
            "model": {"uri": str(self.folder / "model"), "dtype": "float32"},
            "candidates": {"uris": [str(self.folder / "pool.jsonl")]},
            "targets": {"uris": [str(self.folder / "targets.jsonl")]},
            "store": f"s3://chaos/{name}/store",
            "output": f"s3://chaos/{name}/selections",
            "extraction": {"maxLength": 128, "examplesPerShard": ROWS_PER_UNIT, **extraction},
            "selection": {"keep": "highest", "budget": {"fraction": 0.25}},
        }
        return job.write_document(self.folder / f"{name}.yaml", "chaos", spec)

    def start(self, stage: str, spec: Path, *arguments: str) -> subprocess.Popen[bytes]:
        self.logs.append(self.folder / f"{len(self.logs)}-{spec.stem}-{stage}.log")
        with self.logs[-1].open("wb") as log:
            command = job.command(stage, spec, *arguments)
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=self.environment)

    def finish(self, process: subprocess.Popen[bytes], what: str) -> None:
        if process.wait():
            sys.exit(f"{what} failed:\n{self.logs[-1].read_text()[-3000:]}")

    def extract(self, spec: Path, kills: int) -> None:
        def begin(group: int) -> subprocess.Popen[bytes]:
            options = (f"--ranks={self.chosen.ranks}", f"--groups={self.chosen.groups}", f"--group={group}")
            return self.start("extract", spec, *options)

        groups = {group: begin(group) for group in range(self.chosen.groups)}
        last, waited_from = self.num_shards(), time.monotonic()
        while groups:
            for group, process in list(groups.items()):
                if process.poll() == 0:
                    del groups[group]
                elif process.poll() is not None:
                    groups[group] = begin(group)
            ready = [process for process in groups.values() if self.chosen.ranks == 1 or children(process.pid)]
            made_progress = self.num_shards() > last or time.monotonic() > waited_from + SHARD_TIMEOUT_SECONDS
            if ready and made_progress and sum(self.kills.values()) < kills:
                time.sleep(self.random.uniform(0, 1.0))  # into the middle of a unit
                self.kill_one(self.random.choice(ready))
                last, waited_from = self.num_shards(), time.monotonic()
            time.sleep(0.1)

    def kill_one(self, spawner: subprocess.Popen[bytes]) -> None:
        sent = self.random.choice((signal.SIGKILL, signal.SIGTERM))
        ranks = children(spawner.pid)
        victim = self.random.choice(("rank", "spawner", "group") if ranks else ("spawner",))
        pids = {"rank": ranks and [self.random.choice(ranks)], "spawner": [spawner.pid], "group": [*ranks, spawner.pid]}
        for pid in pids[victim]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sent)
        self.kills[f"{victim} {sent.name}"] += 1

    def reduce(self, spec: Path, kills: int) -> Path:
        for _ in range(kills):
            process = self.start("reduce", spec)
            try:
                process.wait(timeout=self.random.uniform(0.3, 4.0))
            except subprocess.TimeoutExpired:
                sent = self.random.choice((signal.SIGKILL, signal.SIGTERM))
                process.send_signal(sent)
                process.wait()
                self.kills[f"reducer {sent.name}"] += 1
        self.finish(self.start("reduce", spec), "reduce")
        return self.logs[-1]

    def num_shards(self) -> int:
        return sum(log.read_bytes().count(b'"event": "shard"') for log in self.logs)

    def outcome(self, log: Path) -> dict[str, Any]:
        """The selection that a reducer's termination message names."""
        uri = events(log)[-1]["manifest"].replace("manifest.json", "selected.parquet")
        script = (
            "import sys\nfrom prism_job.storage.address import open_store, split_uri\n"
            "parent, name = split_uri(sys.argv[1])\nsys.stdout.buffer.write(open_store(parent).get(name))"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, uri], env=self.environment, stdout=subprocess.PIPE, check=True, cwd=ROOT
        )
        return {"selected": hashlib.sha256(done.stdout).hexdigest(), "quarantined": events(log)[-1]["badRows"]}


def start_moto(log: Path, stack: contextlib.ExitStack) -> str:
    """Start moto's server; its address."""
    with log.open("wb") as sink:  # a file: nobody reads a pipe, and a full one stops the server
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        stack.callback(subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT).kill)
    while "Running on" not in log.read_text():
        time.sleep(0.1)
    return next(line for line in log.read_text().splitlines() if "Running on" in line).split()[-1]


def events(log: Path) -> list[dict[str, Any]]:
    """The events in a log, without a last line that a kill truncated."""
    found = []
    for line in log.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and "event" in event:
                found.append(event)
    return found


def children(pid: int) -> list[int]:
    """Ranks that a spawner has started; none where it is the only rank."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"prism_job" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return sorted(found)


if __name__ == "__main__":
    main()
