"""Delivers the end of each run to the webhook, in a thread of its own, at least once.

`status.webhook` is Pending from the write that ends the run until the end was delivered or given up. So another process of the
operator continues, and what ended before a webhook was set is not sent. Does not know how a request is made.
"""

import datetime
import threading
import traceback
from collections.abc import Callable

from launcher.kube.errors import ClusterError
from launcher.kube.recent_outage import growing_pause
from launcher.operator.cache import Cache, RunKey
from launcher.operator.events import create_event
from launcher.operator.executor import Executor
from launcher.operator.webhook import Webhook, body_of, delivery_id
from launcher.operator.work_queue import WorkQueue
from launcher.reconcile.actions import Timeouts
from launcher.reconcile.conditions import Transition, sentence
from launcher.resource.record import Record
from launcher.resource.status import DELIVERED, GIVEN_UP, PENDING, Status, parse_time

LONGEST_PAUSE_SECONDS = 300.0
"""Between two tries."""


class Deliveries:
    """The ends that are not delivered yet. `offer` is called from any thread, the rest runs in the thread of `run`."""

    def __init__(
        self,
        webhook: Webhook,
        executor: Executor,
        cache: Cache,
        kind: str,
        clock: Callable[[], datetime.datetime],
        timeouts: Timeouts,
        log: Callable[..., None],
    ) -> None:
        self.webhook, self.executor, self.cache, self.kind = webhook, executor, cache, kind
        self.clock, self.timeouts, self.log = clock, timeouts, log
        self.queue = WorkQueue()
        self.num_delivered = self.num_failures = 0
        self._lock = threading.Lock()
        self._failures: dict[RunKey, int] = {}
        """By each run that is in the queue, or at work."""
        self._outcomes: dict[RunKey, tuple[str, str]] = {}
        """Delivery and its outcome, where the status does not have it yet."""

    def offer(self, record: Record) -> None:
        """Deliver the end of this run, if it is to be delivered. One that is waiting for its next try keeps waiting."""
        key = (record.namespace, record.name)
        with self._lock:
            if key in self._failures or record.status.webhook != PENDING:
                return
            self._failures[key] = 0
        self.queue.add(key)

    def run(self) -> None:
        """Until `stop`."""
        while (key := self.queue.take()) is not None:
            try:
                is_over = self._deliver(key)
            except ClusterError as error:
                self.log(event="webhook", run="/".join(key), error=f"the status was not written: {error}")
                is_over = False
            except Exception:  # a bug of ours that one run meets must not stop all others
                self.log(event="webhook", run="/".join(key), error=traceback.format_exc())
                is_over = False
            with self._lock:
                if is_over:
                    self._failures.pop(key, None)
                    self._outcomes.pop(key, None)
                else:
                    self._failures[key] += 1
                    self.queue.add(key, growing_pause(self._failures[key], longest_seconds=LONGEST_PAUSE_SECONDS))
            self.queue.done(key)

    def stop(self) -> None:
        """After the current request. What is not delivered stays Pending."""
        self.queue.close()

    def _deliver(self, key: RunKey) -> bool:
        """One try. Whether nothing is left to do. Raises ClusterError: its outcome could not be written."""
        record = self.cache.record(self.kind, key)
        if record is None or record.status.webhook != PENDING:
            return True
        delivery = delivery_id(record)
        of, outcome = self._outcomes.get(key, ("", ""))
        if of != delivery:
            outcome = self._post(record, delivery)
            if not outcome:
                return False
            self._outcomes[key] = (delivery, outcome)
        self.executor.write_status(record, record.status.model_copy(update={"webhook": outcome}))
        return True

    def _post(self, record: Record, delivery: str) -> str:
        """The outcome; empty where it is tried again. Each process of the operator tries at least once."""
        error, run = self.webhook.post(body_of(record), delivery), f"{record.namespace}/{record.name}"
        if not error:
            self.num_delivered += 1
            self.log(event="webhook", run=run, delivery=delivery, phase=record.status.phase)
            return DELIVERED
        self.num_failures += 1
        self.log(event="webhook", run=run, delivery=delivery, error=error)
        if self.clock() < webhook_deadline(record.status, self.timeouts):
            return ""
        message = sentence(f"the webhook did not take the end of this run: {error}")
        create_event(self.executor.cluster, record, Transition(True, "WebhookFailed", message), self.clock())
        return GIVEN_UP


def webhook_deadline(status: Status, timeouts: Timeouts) -> datetime.datetime:
    """Until when a failed delivery is tried again."""
    ended = parse_time(status.completion_time or status.start_time or "1970-01-01T00:00:00Z")
    return ended + datetime.timedelta(seconds=timeouts.webhook_seconds)
