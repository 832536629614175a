"""The reconcile loop: take a run, decide, execute the actions, write the status last.

The operator runs it over all runs that it sees; `prism submit --wait` over its own run. If a host dies at any point, the next
one continues from what the cluster shows. Two at once do no harm: names are functions of the run, and a status is written
onto the version that was read. What to do is decided in launcher/reconcile/decide.py.
"""

import datetime
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from launcher.kube.cluster import Cluster
from launcher.kube.errors import ClusterError, Refused, Unavailable
from launcher.kube.recent_outage import growing_pause
from launcher.operator.cache import Cache, RunKey
from launcher.operator.deliveries import Deliveries
from launcher.operator.events import create_event, read_pod_warnings
from launcher.operator.executor import Executor
from launcher.operator.informer import Informer
from launcher.operator.run_memory import RunMemories
from launcher.operator.webhook import Webhook
from launcher.operator.work_queue import WorkQueue
from launcher.reconcile.actions import Create, Decision, Delete, Timeouts
from launcher.reconcile.conditions import sentence, transitions
from launcher.reconcile.decide import decide
from launcher.resource.names import KIND
from launcher.resource.record import Record
from launcher.resource.status import PENDING, Status

LONGEST_PAUSE_SECONDS = 60.0
"""A pass that fails again and again is repeated this often."""

RESYNC_SECONDS = 600.0
"""Every run has a pass this often even if nothing happens. It reads the cache: what a watch missed is found by the request
before an attempt is given up, and by the list after a broken watch."""

OPERATOR_SECONDS = 30.0
"""A client that finds a new run waits this long for an operator to start on it: longer than a takeover between operators."""


@dataclass
class Counters:
    """What the operator's metrics show."""

    reconciles: int = 0
    failures: int = 0
    status_writes: int = 0
    observe_seconds: Callable[[float], object] = lambda _: None
    """Called with the duration of each pass."""

    observe_end: Callable[[Status], object] = lambda _: None
    """Called with the status of each round that ends: again if a later version runs a document that was rejected."""

    busy_since: dict[int, float] = field(default_factory=dict)
    """Worker -> when its current pass began, so that one that hangs is seen."""


class Controller:
    """The loop over the runs of one namespace, of all, or over one run.

    Args:
        cluster: makes the requests. Its errors are retried here.
        namespace: None for all.
        kind: what records are: SelectionRun or ConfigMap.
        only: the one run to reconcile.
        clock: the time; tests move it.
        log: called with the fields of a log line.
        webhook: is told of the end of each run that this operator ends; None: nobody is.
        host: a client lets the operator go first, and leaves a run alone once an operator has written its status.
    """

    def __init__(
        self,
        cluster: Cluster,
        namespace: str | None,
        *,
        kind: str = KIND,
        only: str | None = None,
        timeouts: Timeouts | None = None,
        clock: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
        log: Callable[..., None] | None = None,
        workers: int = 1,
        webhook: Webhook | None = None,
        host: Literal["operator", "client"] = "operator",
    ) -> None:
        self.cluster, self.kind, self.clock, self.host = cluster, kind, clock, host
        self.timeouts, self.num_workers = timeouts or Timeouts(), workers
        self.log = log or (lambda **_: None)
        self.cache, self.queue, self.memories, self.counters = Cache(), WorkQueue(), RunMemories(), Counters()
        self.executor = Executor(cluster, self.cache, clock, self.log)
        self.informer = Informer(cluster, self.cache, namespace, kind, only, on_change=self.queue.add, log=self.log)
        self.failures: dict[RunKey, int] = {}
        parts = (self.executor, self.cache, kind, clock, self.timeouts, self.log)
        self.deliveries = Deliveries(webhook, *parts) if webhook else None

    def run(self) -> None:
        """Reconcile until `stop`: one worker in this thread, the others in threads of their own."""
        workers = [
            threading.Thread(target=self._work, args=(worker,), daemon=True) for worker in range(1, self.num_workers)
        ]
        if self.deliveries:  # not joined: a request under way would hold up the next leader, which repeats it
            threading.Thread(target=self.deliveries.run, daemon=True).start()
        self.informer.start()
        for thread in workers:
            thread.start()
        self._work(0)
        for thread in workers:
            thread.join()

    def stop(self) -> None:
        """End after the current pass."""
        self.queue.close()
        if self.deliveries:
            self.deliveries.stop()
        self.informer.stop()

    def _work(self, worker: int) -> None:
        self.informer.ready.wait()
        while (key := self.queue.take()) is not None:
            started = self.counters.busy_since[worker] = time.monotonic()
            try:
                self._reconcile_or_requeue(key)
            finally:
                del self.counters.busy_since[worker]
                self.counters.observe_seconds(time.monotonic() - started)
                self.queue.done(key)

    def _reconcile_or_requeue(self, key: RunKey) -> None:
        try:
            self.reconcile(key)
        except ClusterError as error:
            self._requeue_failed(key, str(error), transient=isinstance(error, Unavailable))
        except Exception:  # a bug of ours that one run meets must not stop all others
            self._requeue_failed(key, traceback.format_exc(), transient=False)
        else:
            self.failures.pop(key, None)

    def _requeue_failed(self, key: RunKey, error: str, *, transient: bool) -> None:
        self.counters.failures += 1
        self.failures[key] = self.failures.get(key, 0) + 1
        seconds = growing_pause(self.failures[key], longest_seconds=LONGEST_PAUSE_SECONDS)
        run = f"{key[0]}/{key[1]}"
        self.log(event="retry", run=run, error=error, transient=transient, seconds=round(seconds, 1))
        self.queue.add(key, seconds)

    def reconcile(self, key: RunKey) -> None:
        """One pass over one run.

        Raises:
            ClusterError: an action failed. What was done stands, and the next pass continues from there.
        """
        record = self.cache.record(self.kind, key)
        if record is None:
            self.memories.forget(key)
            return  # The cluster removes its children: they name the record as their owner.
        if self._leaves_to_operator(record):
            return
        self.counters.reconciles += 1
        decision = self._decide(record)
        if _gives_up_attempt(record.status, decision.status) or _deletes(decision):
            # The cache may be behind, each kind by another time: nothing is given up or removed without asking the server.
            refreshed = self.informer.refresh(record)
            if refreshed is None:
                return
            record = refreshed
            decision = self._decide(record, refresh=True)
        refusal = self._execute(decision, record)
        if refusal is not None:
            # The status of the refused Jobs, and of all others with those just created. Its actions wait for the next pass.
            decision = self._decide(record)
        self._write_status(record, decision.status)
        if self.deliveries and (written := self.cache.record(self.kind, key)):
            self.deliveries.offer(written)
        for transition in transitions(record.status, decision.status):
            create_event(self.cluster, record, transition, self.clock())
        if refusal is not None and not decision.status.is_terminal:
            raise refusal  # the pass is repeated, with growing pauses
        wait_seconds = RESYNC_SECONDS
        if decision.requeue_at is not None:
            wait_seconds = min(wait_seconds, (decision.requeue_at - self.clock()).total_seconds() + 0.05)
        self.queue.add(key, wait_seconds)

    def _decide(self, record: Record, *, refresh: bool = False) -> Decision:
        memory = self.memories.of(record)
        observed = self.cache.observed(record)
        warnings = read_pod_warnings(
            self.cluster, record, observed, memory, self.clock(), self.queue.add, refresh=refresh
        )
        observed = self.cache.observed(record, warnings, memory.create_errors)
        return decide(record, observed, self.clock(), self.timeouts)

    def _execute(self, decision: Decision, record: Record) -> Refused | None:
        """Returns the last refusal of a Job, about which the next decision knows. Raises every other error."""
        refusal: Refused | None = None
        create_errors = self.memories.of(record).create_errors
        for action in decision.actions:
            try:
                self.executor.execute(action, record, create_errors)
            except Refused as error:
                refusal = error
                if not (isinstance(action, Create) and action.object["metadata"]["name"] in create_errors):
                    # A missing right, a name that is taken: it may pass, and the status should report it until then.
                    self._write_status(record, record.status.model_copy(update={"message": sentence(error.what)}))
                    raise
        return refusal

    def _write_status(self, record: Record, status: Status) -> None:
        ends = status.is_terminal and not (record.status.is_terminal and record.status.round == status.round)
        webhook = {"webhook": PENDING} if ends and self.deliveries else {}
        if self.executor.write_status(record, status.model_copy(update={"driver": self.host, **webhook})):
            self.counters.status_writes += 1
            if ends:
                self.counters.observe_end(status)

    def _leaves_to_operator(self, record: Record) -> bool:
        """Whether this host is a client, and an operator reconciles the run or may still start to."""
        if self.host == "operator" or record.is_config_map:
            return False
        status = record.status
        if status.driver == "operator" and status.round >= record.round:
            return True
        wait_seconds = self.memories.of(record).first_seen + OPERATOR_SECONDS - time.monotonic()
        if status.driver == "client" or wait_seconds <= 0:
            return False
        self.queue.add((record.namespace, record.name), wait_seconds)
        return True


def _gives_up_attempt(before: Status, after: Status) -> bool:
    """Whether an attempt that was started is given up, for another one or for good."""
    if before.round != after.round:
        return False
    pairs = [(before.stage(now.stage, now.group), now) for now in after.stages]
    return any(now.attempt > old.attempt or (now.state == "Failed" != old.state) for old, now in pairs)


def _deletes(decision: Decision) -> bool:
    return any(isinstance(action, Delete) for action in decision.actions)
