"""The work queue: each run once, at one worker at a time, as soon as it is due."""

from __future__ import annotations

import threading
import time
from typing import Any

from launcher.operator.work_queue import WorkQueue
from tests.cluster.rig import eventually


def test_a_run_is_taken_once_however_often_it_was_added() -> None:
    queue = WorkQueue()
    for _ in range(5):
        queue.add(("team", "a"))
    assert queue.take() == ("team", "a")
    queue.done(("team", "a"))
    assert len(queue) == 0


def test_the_earlier_time_stands() -> None:
    queue = WorkQueue()
    queue.add(("team", "a"), 60)
    queue.add(("team", "a"), 0.05)
    queue.add(("team", "a"), 30)
    started = time.monotonic()
    assert queue.take() == ("team", "a")
    assert 0.04 < time.monotonic() - started < 5
    assert len(queue) == 0


def test_the_depth_of_the_queue_counts_what_is_due_and_waits_and_its_length_everything() -> None:
    queue = WorkQueue()
    assert (queue.num_due(), len(queue)) == (0, 0)
    for name in ("a", "b"):
        queue.add(("team", name))
    queue.add(("team", "later"), 600)
    assert (queue.num_due(), len(queue)) == (2, 3)
    taken = queue.take()
    assert taken is not None
    assert (queue.num_due(), len(queue)) == (1, 2)
    queue.done(taken)
    assert (queue.num_due(), len(queue)) == (1, 2)


def test_no_run_is_at_two_workers_and_each_change_has_a_later_pass() -> None:
    queue, lock = WorkQueue(), threading.Lock()
    keys = [("team", str(number)) for number in range(5)]
    at_work: list[Any] = []
    clashes: list[Any] = []
    passes: dict[Any, int] = dict.fromkeys(keys, 0)

    def work() -> None:
        while (key := queue.take()) is not None:
            with lock:
                if key in at_work:
                    clashes.append(key)
                at_work.append(key)
            time.sleep(0.002)
            with lock:
                at_work.remove(key)
                passes[key] += 1
            queue.done(key)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for _ in range(100):
        for key in keys:
            queue.add(key)
        time.sleep(0.001)
    eventually(lambda: len(queue) == 0 and not at_work, 10)
    queue.close()
    for worker in workers:
        worker.join(5)
    assert not clashes
    assert all(passes.values())


def test_a_run_that_is_due_during_its_pass_comes_again_and_holds_up_no_other() -> None:
    queue = WorkQueue()
    queue.add(("team", "a"))
    assert queue.take() == ("team", "a")
    queue.add(("team", "a"))
    queue.add(("team", "b"))
    assert queue.take() == ("team", "b")
    queue.done(("team", "a"))
    assert queue.take() == ("team", "a")


def test_close_wakes_all_who_wait() -> None:
    queue, taken = WorkQueue(), []
    waiting = [threading.Thread(target=lambda: taken.append(queue.take())) for _ in range(3)]
    for thread in waiting:
        thread.start()
    queue.close()
    for thread in waiting:
        thread.join(5)
    assert taken == [None, None, None]
