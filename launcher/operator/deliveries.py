"""Delivers the end of each run to the webhook, in a thread of its own, at least once.

`status.webhook` is Pending from the write that ends the run until the end was delivered or given up. So another process of the
operator continues, and what ended before a webhook was set is not sent. Does not know how a request is made.
"""

import datetime
import threading
import time
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
from launcher.reconcile.conditions import Transition
from launcher.resource.record import Record
from launcher.resource.status import DELIVERED, GIVEN_UP, PENDING, Status, parse_time

LONGEST_PAUSE_SECONDS = 300.0
"""Between two tries."""

TURN_SECONDS = 0.05
"""After an outage the end whose request failed comes after the others, so that one that is never taken holds up none."""


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
        self._outage = ""
        """Why the last request found the address out of service; empty: it answered."""
        self._outage_failures, self._outage_until = 0, 0.0

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
                pause_seconds = self._deliver(key)
            except ClusterError as error:
                self.log(event="webhook", run="/".join(key), error=f"the status was not written: {error}")
                pause_seconds = self._pause_after_failure(key)
            except Exception:  # a bug of ours that one run meets must not stop all others
                self.log(event="webhook", run="/".join(key), error=traceback.format_exc())
                pause_seconds = self._pause_after_failure(key)
            with self._lock:
                if pause_seconds is None:
                    self._failures.pop(key, None)
                    self._outcomes.pop(key, None)
                else:
                    self.queue.add(key, pause_seconds)
            self.queue.done(key)

    def stop(self) -> None:
        """After the current request. What is not delivered stays Pending."""
        self.queue.close()

    def _deliver(self, key: RunKey) -> float | None:
        """One try. Seconds until the next one; None: nothing is left to do.

        Raises:
            ClusterError: its outcome could not be written.
        """
        record = self.cache.record(self.kind, key)
        if record is None or record.status.webhook != PENDING:
            return None
        delivery = delivery_id(record)
        of, outcome = self._outcomes.get(key, ("", ""))
        if of != delivery:
            outage_seconds = self._outage_until - time.monotonic()
            if outage_seconds > 0 and not self._is_too_late(record):
                return outage_seconds
            error = self._outage if outage_seconds > 0 else self._post(record, delivery)
            if error and not self._is_too_late(record):
                return self._pause_after_failure(key)
            outcome = self._give_up(record, delivery, error) if error else DELIVERED
            self._outcomes[key] = (delivery, outcome)
        self.executor.write_status(record, record.status.model_copy(update={"webhook": outcome}))
        return None

    def _post(self, record: Record, delivery: str) -> str:
        """Why the request failed; empty where it was taken. In an outage all ends wait, so that it costs one request."""
        failure = self.webhook.post(body_of(record), delivery)
        result = {"error": failure.error} if failure else {"phase": record.status.phase}
        self.log(event="webhook", run=f"{record.namespace}/{record.name}", delivery=delivery, **result)
        if failure is None or not failure.is_outage:
            self._outage, self._outage_failures = "", 0
        else:
            self._outage, self._outage_failures = failure.error, self._outage_failures + 1
            pause_seconds = growing_pause(self._outage_failures, longest_seconds=LONGEST_PAUSE_SECONDS)
            self._outage_until = time.monotonic() + pause_seconds
        if failure is None:
            self.num_delivered += 1
            return ""
        self.num_failures += 1
        return failure.error

    def _pause_after_failure(self, key: RunKey) -> float:
        self._failures[key] += 1
        pause_seconds = growing_pause(self._failures[key], longest_seconds=LONGEST_PAUSE_SECONDS)
        return max(pause_seconds, self._outage_until - time.monotonic()) + TURN_SECONDS

    def _is_too_late(self, record: Record) -> bool:
        return self.clock() >= webhook_deadline(record.status, self.timeouts)

    def _give_up(self, record: Record, delivery: str, error: str) -> str:
        """The event is in the namespace of a user, who may not know the address: the error is in the log only."""
        self.log(event="webhook given up", run=f"{record.namespace}/{record.name}", delivery=delivery, error=error)
        message = "the operator's webhook did not take the end of this run; see the operator's log"
        create_event(self.executor.cluster, record, Transition(True, "WebhookFailed", message), self.clock())
        return GIVEN_UP


def webhook_deadline(status: Status, timeouts: Timeouts) -> datetime.datetime:
    """Until when a failed delivery is tried again."""
    ended = parse_time(status.completion_time or status.start_time or "1970-01-01T00:00:00Z")
    return ended + datetime.timedelta(seconds=timeouts.webhook_seconds)
