"""The webhook on the end of a run: against a real HTTP server, through failures and restarts of the operator."""

from __future__ import annotations

import copy
import datetime
import hashlib
import hmac
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.kube.errors import Unavailable
from launcher.operator import deliveries
from launcher.operator.metrics import metrics_registry
from launcher.operator.webhook import Failure, Webhook, delivery_id
from launcher.reconcile.actions import Timeouts
from launcher.resource.crd import crd
from launcher.resource.record import Record
from launcher.resource.status import parse_time
from tests.cluster.certificates import Authority
from tests.cluster.rig import eventually, variables
from tests.cluster.server.apiserver import ApiServer
from tests.operator.host import QUICK, a_run, complete_run, end, hosted, status_of, unfinished
from tests.operator.receiver import Receiver, dripping
from tests.operator.test_leader_election import a_lease
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


def a_wrong_run(name: str = "demo") -> Object:
    """A document that ends its run at once."""
    return a_run(name, podOverlay={"spec": {"hostNetwork": True, "containers": [{"$patch": "no"}]}})


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
    assert headers["X-Prism-Delivery"] == f"{found['uid']}-0-{int(parse_time(found['completionTime']).timestamp())}"
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
    server.create(a_wrong_run())
    with Receiver() as receiver, hosted(webhook=webhook_of(receiver)) as host:
        eventually(lambda: is_webhook(server, "Delivered"), 10)
        host.controller.queue.add(("default", "demo"))
        time.sleep(0.3)
        assert len(receiver.requests) == 1
        assert is_webhook(server, "Delivered")
    assert json.loads(receiver.requests[0][1])["reason"] == "InvalidSpec"


def test_two_ends_of_one_round_are_two_deliveries(server: ApiServer) -> None:
    """An earlier version rejected the document, this one runs it: a receiver that deduplicates must not drop its end."""
    at = "2026-01-01T00:00:00Z"
    accepted = {"type": "Accepted", "status": "False", "reason": "InvalidSpec", "message": "", "lastTransitionTime": at}
    made = copy.deepcopy(server.create(a_run()))
    made["status"] = {"phase": "Failed", "completionTime": at, "webhook": "Delivered", "conditions": [accepted]}
    rejected = Record({"kind": "SelectionRun", **server.update(made, subresource="status")})
    with Receiver() as receiver, hosted(webhook=webhook_of(receiver)):
        eventually(lambda: status_of(server).phase != "Failed", 10)
        assert complete_run(server).phase == "Complete"
        eventually(lambda: is_webhook(server, "Delivered"), 10)
        ((headers, body),) = receiver.requests
    assert json.loads(body)["round"] == rejected.status.round
    assert headers["X-Prism-Delivery"] != delivery_id(rejected)


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
    assert "see the operator's log" in event["message"]
    assert any("refused" in it.get("error", "") for it in host.logged)
    assert "prism" not in event["message"]
    assert str(receiver.server.server_address[1]) not in json.dumps([host.logged, server.objects("events")])


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


def test_an_answer_that_drips_is_no_answer_in_time_and_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    with dripping() as url:
        failure = Webhook(url, timeout_seconds=0.3).post(b"{}", "1")
        assert failure == Failure("no answer within 0.3 s", is_outage=True)
        eventually(lambda: not [it for it in threading.enumerate() if it not in before and "webhook" in it.name], 10)


def test_an_outage_costs_one_request_at_a_time_however_many_ends_wait(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries, "LONGEST_PAUSE_SECONDS", 5.0)
    names = [f"run-{number}" for number in range(20)]
    for name in names:
        server.create(a_wrong_run(name))
    with Receiver(503) as receiver, hosted(webhook=webhook_of(receiver)):
        eventually(lambda: all(is_webhook(server, "Pending", name) for name in names), 20)
        eventually(lambda: len(receiver.requests) > 2, 10)
        assert len(receiver.requests) < len(names) / 2
        receiver.answers[:] = [200]
        eventually(lambda: all(is_webhook(server, "Delivered", name) for name in names), 20)


def test_ends_whose_time_is_over_are_given_up_together_in_an_outage(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries, "LONGEST_PAUSE_SECONDS", 60.0)
    names = [f"run-{number}" for number in range(20)]
    for name in names:
        server.create(a_wrong_run(name))
    with Receiver(503) as receiver, hosted(webhook=webhook_of(receiver)) as host:
        assert host.controller.deliveries
        eventually(lambda: all(is_webhook(server, "Pending", name) for name in names), 20)
        host.controller.deliveries.timeouts = giving_up_at_once()
        eventually(lambda: all(is_webhook(server, "GivenUp", name) for name in names), 20)
        assert len(receiver.requests) < len(names) / 2
    assert len(webhook_events(server)) == len(names)


@pytest.mark.parametrize("status", [400, 500])
def test_an_end_that_is_never_taken_holds_up_no_other(server: ApiServer, status: int) -> None:
    class Refusing(Webhook):
        def post(self, body: bytes, delivery: str) -> Failure | None:
            is_refused = json.loads(body)["name"] == "a"
            return Failure(f"HTTP status {status}", is_outage=status == 500) if is_refused else None

    names = ["a", "b", "c", "d"]
    for name in names:
        server.create(a_wrong_run(name))
    with hosted(webhook=Refusing("http://h/")) as host:
        eventually(lambda: all(is_webhook(server, "Delivered", name) for name in names[1:]), 10)
        eventually(lambda: len([it for it in host.events("webhook") if it["run"] == "default/a"]) > 3, 10)
        assert is_webhook(server, "Pending", "a")


def test_the_age_of_the_oldest_end_that_waits_is_a_metric(server: ApiServer) -> None:
    later = datetime.timedelta()
    server.create(a_wrong_run())
    with (
        Receiver(500) as receiver,
        hosted(webhook=webhook_of(receiver), clock=lambda: datetime.datetime.now(datetime.UTC) + later) as host,
    ):
        registry = metrics_registry(host.controller, a_lease("a"))
        eventually(lambda: is_webhook(server, "Pending"), 10)
        later = datetime.timedelta(seconds=1000)
        assert (registry.get_sample_value("prism_webhook_oldest_pending_seconds") or 0) >= 1000
        receiver.answers[:] = [200]
        eventually(lambda: is_webhook(server, "Delivered"), 10)
        eventually(lambda: registry.get_sample_value("prism_webhook_oldest_pending_seconds") == 0, 10)


def test_an_operator_with_an_earlier_crd_says_once_which_fields_the_server_drops(server: ApiServer) -> None:
    earlier = crd()
    found = server.object("customresourcedefinitions", earlier["metadata"]["name"], "")
    assert found is not None
    (version,) = found["spec"]["versions"]
    del version["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]["webhook"]
    server.update(found)
    for name in ("one", "two"):
        server.create(a_wrong_run(name))
    with Receiver() as receiver, hosted(webhook=webhook_of(receiver)) as host:
        eventually(lambda: all(status_of(server, name).phase == "Failed" for name in ("one", "two")), 10)
        eventually(lambda: bool(host.events("status fields dropped by the server")), 10)
        time.sleep(0.2)
        (said,) = host.events("status fields dropped by the server")
        assert said["fields"] == ["webhook"]
        assert receiver.requests == []


def test_an_operator_with_its_own_crd_finds_no_dropped_field(server: ApiServer) -> None:
    server.create(a_run(gpuHourPrice=2.5))
    with Receiver() as receiver, hosted(webhook=webhook_of(receiver)) as host:
        assert complete_run(server).phase == "Complete"
        eventually(lambda: is_webhook(server, "Delivered"), 10)
        assert host.events("status fields dropped by the server") == []


def test_a_certificate_of_an_unknown_authority_is_refused(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with Receiver(certificate=authority.sign("receiver", hosts=("127.0.0.1",))) as receiver:
        failure = webhook_of(receiver).post(b"{}", "1")
        assert failure is not None
        assert "CERTIFICATE_VERIFY_FAILED" in failure.error
        assert receiver.requests == []
        with variables(SSL_CERT_FILE=str(authority.pair.certificate)):
            assert webhook_of(receiver).post(b"{}", "1") is None


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "example.com/hook", "https://", "https://user:word@host/", "http://[::1/TOKEN"),
        *("http://127.0.0.1:99999/TOKEN", "http://h:0/TOKEN", "http://h:x/TOKEN", f"http://{'a' * 64}/TOKEN"),
        *("https://h/TOKEN\n", " https://h/TOKEN", "https://h/TO KEN", "https://h/TOKEN\x00", "https://h/TÖKEN"),
    ],
)
def test_an_address_that_is_none_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ValueError, match="it begins with") as raised:
        Webhook(url)
    assert "TOKEN" not in str(raised.value)


@pytest.mark.parametrize("secret", ["key\n", " key", "k\x00ey", "k\udc80"])
def test_a_secret_that_its_receiver_may_read_otherwise_is_refused(secret: str) -> None:
    with pytest.raises(ValueError, match="PRISM_WEBHOOK_SECRET") as raised:
        Webhook("https://h/", secret)
    assert secret not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://h", ("h", 443, "/")),
        ("http://h/a?b=c#d", ("h", 80, "/a?b=c")),
        ("http://[::1]:8080/a", ("::1", 8080, "/a")),
    ],
)
def test_an_address_is_a_host_a_port_and_what_is_asked_of_it(url: str, address: tuple[str, int, str]) -> None:
    webhook = Webhook(url)
    assert (webhook.host, webhook.port, webhook.target) == address


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
