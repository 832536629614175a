"""The webhook on the end of a run: against a real HTTP server, through failures and restarts of the operator."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.kube.errors import Unavailable
from launcher.operator import deliveries
from launcher.operator.webhook import Webhook
from launcher.reconcile.actions import Timeouts
from tests.cluster.certificates import Authority
from tests.cluster.rig import eventually, variables
from tests.cluster.server.apiserver import ApiServer
from tests.operator.host import QUICK, a_run, complete_run, end, hosted, status_of, unfinished
from tests.operator.receiver import Receiver
from tests.reconcile.world import complete, seconds

Object = dict[str, Any]
KEYS = {
    *(
        "event",
        "name",
        "namespace",
        "uid",
        "round",
        "phase",
        "reason",
        "message",
        "manifest",
        "selectionId",
        "selected",
    ),
    *("candidates", "startTime", "completionTime", "durationSeconds", "gpuHours", "gpu", "price"),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliveries, "LONGEST_PAUSE_SECONDS", 0.2)


def webhook_of(receiver: Receiver, secret: str = "", seconds: float = 5.0) -> Webhook:
    return Webhook(f"{receiver.url}/prism", secret, timeout_seconds=seconds)


def is_webhook(server: ApiServer, state: str, name: str = "demo") -> bool:
    return status_of(server, name).webhook == state


def giving_up_at_once() -> Timeouts:
    return Timeouts(**{**vars(QUICK), "webhook_seconds": 0.0})


def test_the_end_of_a_run_is_posted_once_and_signed(server: ApiServer) -> None:
    server.create(a_run())
    with Receiver() as receiver, hosted(webhook=webhook_of(receiver, "key")) as host:
        complete_run(server)
        eventually(lambda: is_webhook(server, "Delivered"), 10)
        for _ in range(5):
            host.controller.queue.add(("default", "demo"))
            time.sleep(0.05)
        ((headers, body),) = receiver.requests
    found = json.loads(body)
    assert found.keys() == KEYS
    assert (found["phase"], found["reason"], found["selected"], found["candidates"]) == ("Complete", "Complete", 3, 8)
    assert (found["name"], found["namespace"], found["gpuHours"], found["price"]) == ("demo", "default", 0.0, None)
    assert (found["manifest"], found["selectionId"]) == ("s3://b/m.json", "b")
    assert headers["X-Prism-Delivery"] == f"{found['uid']}-0"
    assert headers["X-Prism-Signature-256"] == f"sha256={hmac.new(b'key', body, hashlib.sha256).hexdigest()}"
    assert headers["Content-Type"] == "application/json"


def test_without_a_secret_nothing_is_signed(server: ApiServer) -> None:
    server.create(a_run())
    with Receiver() as receiver, hosted(webhook=webhook_of(receiver)):
        complete_run(server)
        eventually(lambda: is_webhook(server, "Delivered"), 10)
    assert "X-Prism-Signature-256" not in receiver.requests[0][0]


def test_a_failed_run_is_posted_with_its_reason(server: ApiServer) -> None:
    server.create(a_run())
    with Receiver() as receiver, hosted(webhook=webhook_of(receiver)):
        eventually(lambda: bool(unfinished(server)), 10)
        end(server, unfinished(server)[0], 64, '{"error": "no such model", "where": "spec.model", "fix": "correct it"}')
        eventually(lambda: is_webhook(server, "Delivered"), 10)
    found = json.loads(receiver.requests[0][1])
    assert (found["phase"], found["reason"], found["manifest"]) == ("Failed", "WrongRequest", None)
    assert "no such model" in found["message"]


def test_a_document_that_cannot_run_is_posted_once(server: ApiServer) -> None:
    document = a_run()
    document["spec"]["cluster"]["podOverlay"] = {"spec": {"hostNetwork": True, "containers": [{"$patch": "no"}]}}
    server.create(document)
    with Receiver() as receiver, hosted(webhook=webhook_of(receiver)) as host:
        eventually(lambda: is_webhook(server, "Delivered"), 10)
        host.controller.queue.add(("default", "demo"))
        time.sleep(0.3)
        assert len(receiver.requests) == 1
        assert is_webhook(server, "Delivered")
    assert json.loads(receiver.requests[0][1])["reason"] == "InvalidSpec"


@pytest.mark.parametrize("answer", [500, 302, 308, 404, 1.0])
def test_a_request_that_is_not_taken_is_repeated_with_the_same_delivery(server: ApiServer, answer: float) -> None:
    """An error, a redirect, which is not followed, or no answer in time; then 200."""
    server.create(a_run())
    with Receiver(answer, 200) as receiver, hosted(webhook=webhook_of(receiver, seconds=0.4)):
        complete_run(server)
        eventually(lambda: is_webhook(server, "Delivered"), 10)
        first, second = receiver.requests
    assert first[1] == second[1]
    assert first[0]["X-Prism-Delivery"] == second[0]["X-Prism-Delivery"]


def test_a_refused_connection_is_given_up_in_the_end_and_an_event_says_so(server: ApiServer) -> None:
    with Receiver() as receiver:
        webhook = webhook_of(receiver)  # closed from here on: nobody listens at its port
    server.create(a_run())
    with hosted(webhook=webhook) as host:
        complete_run(server)
        eventually(lambda: len(host.events("webhook")) > 2, 10)
        assert is_webhook(server, "Pending")
        assert webhook_events(server) == []
        host.controller.timeouts = host.controller.deliveries.timeouts = giving_up_at_once()  # type: ignore[union-attr]
        eventually(lambda: is_webhook(server, "GivenUp"), 10)
        num_tries = len(host.events("webhook"))
        time.sleep(0.5)
        assert len(host.events("webhook")) == num_tries
    (event,) = webhook_events(server)
    assert event["type"] == "Warning"
    assert "refused" in event["message"]


def webhook_events(server: ApiServer) -> list[Object]:
    return [event for event in server.objects("events") if event["reason"] == "WebhookFailed"]


def test_another_operator_delivers_what_the_first_could_not(server: ApiServer) -> None:
    server.create(a_run())
    with Receiver(500) as receiver, hosted(webhook=webhook_of(receiver)):
        complete_run(server)
        eventually(lambda: bool(receiver.requests), 10)
    assert is_webhook(server, "Pending")
    with Receiver() as receiver:
        for _ in range(3):
            with hosted(webhook=webhook_of(receiver)):
                eventually(lambda: is_webhook(server, "Delivered"), 10)
        assert len(receiver.requests) == 1


def test_an_operator_that_dies_before_it_recorded_a_delivery_repeats_it_and_no_other_does(server: ApiServer) -> None:
    server.create(a_run())
    with Receiver() as receiver:
        with hosted(webhook=webhook_of(receiver)) as host:
            assert host.controller.deliveries

            def dies(*_: Any) -> bool:
                raise Unavailable("dies here", where="", fix="")

            host.controller.deliveries.executor = _Executor(host.controller.executor, dies)  # type: ignore[assignment]
            complete_run(server)
            eventually(lambda: len(host.events("webhook")) > 3, 10)
            assert len(receiver.requests) == 1, "the write is repeated, not the request"
        for _ in range(2):
            with hosted(webhook=webhook_of(receiver)):
                eventually(lambda: is_webhook(server, "Delivered"), 10)
                time.sleep(0.2)
        first, second = receiver.requests
    assert first == second


class _Executor:
    def __init__(self, executor: Any, write_status: Any) -> None:
        self.cluster, self.write_status = executor.cluster, write_status


def test_what_ended_before_there_was_a_webhook_is_not_posted(server: ApiServer) -> None:
    server.create(a_run())
    with hosted():
        complete_run(server)
    with Receiver() as receiver, hosted(webhook=webhook_of(receiver)) as host:
        eventually(lambda: host.controller.counters.reconciles > 0, 10)
        time.sleep(0.3)
        assert receiver.requests == []


def test_a_webhook_that_hangs_holds_up_no_run(server: ApiServer) -> None:
    with Receiver(60.0) as receiver, hosted(webhook=webhook_of(receiver, seconds=60)):
        for name in ("one", "two"):
            server.create(a_run(name))
            assert complete_run(server, name).phase == "Complete"
        eventually(lambda: len(receiver.requests) == 1, 10)
        receiver.server.socket.close()


def test_a_certificate_of_an_unknown_authority_is_refused(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with Receiver(certificate=authority.sign("receiver", hosts=("127.0.0.1",))) as receiver:
        assert "CERTIFICATE_VERIFY_FAILED" in webhook_of(receiver).post(b"{}", "1")
        assert receiver.requests == []
        with variables(SSL_CERT_FILE=str(authority.pair.certificate)):
            assert webhook_of(receiver).post(b"{}", "1") == ""


@pytest.mark.parametrize("url", ["file:///etc/passwd", "example.com/hook", "https://", "https://user:word@host/"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="it begins with"):
        Webhook(url)


def test_the_record_of_a_run_waits_for_its_delivery() -> None:
    world = complete()
    world.change(ttlSecondsAfterFinished=0)
    assert world.record
    world.record["status"]["webhook"] = "Pending"
    world.settle()
    assert world.record is not None
    world.record["status"]["webhook"] = "Delivered"
    world.settle()
    assert world.record is None


def test_the_record_of_a_run_does_not_wait_for_ever() -> None:
    world = complete()
    world.change(ttlSecondsAfterFinished=0)
    assert world.record
    world.record["status"]["webhook"] = "Pending"
    world.settle()
    world.now += seconds(7201)
    world.settle()
    assert world.record is None
