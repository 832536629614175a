"""Sees every change in the API server's store as it is made, and checks it against the laws of a run. Knows no writer.

The laws: one unfinished Job of a (stage, group) at a time; no Job of a round that has ended; a terminal phase stays for its
round; counters within their caps.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from launcher.resource.names import GROUP_LABEL, ROUND_LABEL, RUN_LABEL, STAGE_LABEL
from launcher.resource.status import TERMINAL
from tests.cluster.server.apiserver import ApiServer
from tests.cluster.server.store import Place

Object = dict[str, Any]


@dataclass
class Account:
    """What was seen of one run."""

    began: float
    history: list[tuple[float, int, str, str]] = field(default_factory=list)
    """(seconds since it began, round, phase, message), a line a change; Jobs made and removed among them."""

    status: Object = field(default_factory=dict)
    is_there: bool = True
    ended_rounds: dict[int, str] = field(default_factory=dict)
    jobs: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """Jobs made, by (round, stage, group)."""

    pods: dict[str, Object] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)

    @property
    def phase(self) -> str:
        return str(self.status.get("phase", ""))

    def lines(self) -> list[str]:
        return [f"{at:7.2f} s  round {number}  {phase:<11}{message}" for at, number, phase, message in self.history]


class Witness:
    """Listens from its making on."""

    def __init__(self, server: ApiServer) -> None:
        self.accounts: dict[str, Account] = {}
        self.overlaps: dict[str, float] = {}
        """Jobs of one place that were unfinished together -> for how many seconds."""
        self._open: dict[tuple[str, str, str], set[str]] = defaultdict(set)
        self._together: dict[tuple[str, ...], float] = {}
        server.store.listeners.append(self._see)

    def running(self, run: str) -> list[str]:
        """Names of the run's pods that run."""
        pods = list(self.accounts[run].pods.items()) if run in self.accounts else []
        return [name for name, pod in pods if pod.get("status", {}).get("phase") == "Running"]

    def _see(self, place: Place, old: Object | None, new: Object | None) -> None:
        seen = new or old
        assert seen is not None
        if place[1] == "selectionruns":
            self._see_record(place[3], new)
            return
        run = (seen["metadata"].get("labels") or {}).get(RUN_LABEL)
        account = self.accounts.get(run or "")
        if account is None:
            return
        if place[1] == "pods":
            account.pods.pop(place[3], None)
            if new is not None:
                account.pods[place[3]] = new
        elif place[1] == "jobs":
            self._see_job(account, run, old, new)

    def _see_record(self, run: str, new: Object | None) -> None:
        account = self.accounts.setdefault(run, Account(time.monotonic()))
        if new is None:
            account.is_there = False
            return
        status = new.get("status") or {}
        before, account.status = account.status, status
        round_number, phase = int(status.get("round", 0)), status.get("phase", "")
        if (phase, round_number, status.get("message")) != (
            before.get("phase"),
            before.get("round"),
            before.get("message"),
        ):
            self._note(account, round_number, phase, status.get("message", ""))
        ended = account.ended_rounds.get(round_number)
        if ended and phase != ended:
            account.violations.append(f"round {round_number} was {ended} and is {phase or 'nothing'}")
        if before and int(before.get("round", 0)) > round_number:
            account.violations.append(f"round {before['round']} was followed by {round_number}")
        if phase in TERMINAL:
            account.ended_rounds[round_number] = phase
        spec = new["spec"]["cluster"]
        for entry in status.get("stages") or ():
            for name, cap in (("restarts", "maxRestarts"), ("preemptions", "maxPreemptions")):
                if entry.get(name, 0) > spec.get(cap, entry.get(name, 0)):
                    account.violations.append(
                        f"{entry['stage']} {entry['group']}: {entry[name]} {name}, of {spec[cap]}"
                    )

    def _note(self, account: Account, round_number: int, what: str, message: str) -> None:
        account.history.append((round(time.monotonic() - account.began, 2), round_number, what, message))

    def _see_job(self, account: Account, run: str, old: Object | None, new: Object | None) -> None:
        seen = new or old
        assert seen is not None
        labels, name = seen["metadata"]["labels"], seen["metadata"]["name"]
        here = self._open[run, labels[STAGE_LABEL], labels[GROUP_LABEL]]
        if old is None:
            account.jobs[labels[ROUND_LABEL], labels[STAGE_LABEL], labels[GROUP_LABEL]] += 1
            self._note(account, int(labels[ROUND_LABEL]), "+ Job", name)
            if ended := account.ended_rounds.get(int(labels[ROUND_LABEL])):
                account.violations.append(f"{name} was made although its round was {ended}")
        if new is None:
            self._note(account, int(labels[ROUND_LABEL]), "- Job", name)
        before = sorted(here)
        (here.add if new is not None and is_unfinished(new) else here.discard)(name)
        if len(here) > 1 and sorted(here) != before:
            account.violations.append(f"{' and '.join(sorted(here))} were there at once")
            self._together[tuple(sorted(here))] = time.monotonic()
        if len(here) < len(before) and (since := self._together.pop(tuple(before), None)):
            self.overlaps[" and ".join(before)] = time.monotonic() - since


def is_unfinished(job: Object) -> bool:
    conditions = job.get("status", {}).get("conditions") or ()
    ended = any(one["type"] in ("Complete", "Failed") and one["status"] == "True" for one in conditions)
    return not ended and "deletionTimestamp" not in job["metadata"]
