"""Laws of the verbs that talk to a cluster, against the fake API server: what they print, refuse and exit with."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.resource.crd import crd
from launcher.resource.document import parse_for_cluster
from launcher.resource.record import config_map_record
from prism_job.errors import SpecError
from tests.cluster.certificates import Authority
from tests.cluster.grants import grant
from tests.cluster.kueue import kueue, suspended_job, workload
from tests.cluster.rig import eventually
from tests.cluster.server.apiserver import ApiServer
from tests.run_document import run_document

ROOT = Path(__file__).parents[2]
DOCUMENT = yaml.safe_load((ROOT / "examples/sums/cluster.yaml").read_text()) | {"metadata": {"name": "facts"}}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    with ApiServer(log_folder=tmp_path / "logs") as made:
        yield made


@pytest.fixture
def with_kind(server: ApiServer) -> ApiServer:
    server.create(crd())
    return server


def start(kubeconfig: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launcher.cli.main", *arguments]
    env = {**os.environ, "KUBECONFIG": str(kubeconfig)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


def prism(server: ApiServer, folder: Path, *arguments: str, token: str | None = None) -> tuple[int, str, str]:
    return finish(start(server.kubeconfig(folder / "kubeconfig", token=token), *arguments))


@contextlib.contextmanager
def running(server: ApiServer, folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = start(server.kubeconfig(folder / "kubeconfig"), *arguments)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def written(folder: Path, **changes: Any) -> str:
    path = folder / "selection.yaml"
    path.write_text(yaml.safe_dump({**DOCUMENT, "spec": {**DOCUMENT["spec"], **changes}}))
    return str(path)


def ended(server: ApiServer, phase: str, **status: Any) -> None:
    """A run that an operator has brought to its end."""
    created = server.create({**DOCUMENT, "metadata": {"name": "facts", "namespace": "default"}})
    since = {"startTime": "2026-01-01T00:00:00Z", "driver": "operator"}
    server.update({**created, "status": {"phase": phase, **since, **status}}, subresource="status")


@pytest.mark.parametrize(("phase", "code"), [("Complete", 0), ("Failed", 100), ("Cancelled", 103)])
@pytest.mark.parametrize("verb", ["wait", "watch"])
def test_the_exit_code_is_the_outcome(with_kind: ApiServer, tmp_path: Path, verb: str, phase: str, code: int) -> None:
    ended(with_kind, phase)
    assert prism(with_kind, tmp_path, verb, "facts")[0] == code


def test_an_unknown_run_is_102_and_an_unfinished_one_is_101(with_kind: ApiServer, tmp_path: Path) -> None:
    assert prism(with_kind, tmp_path, "wait", "facts")[0] == 102
    ended(with_kind, "Planning")
    assert prism(with_kind, tmp_path, "wait", "facts", "--timeout", "0.5")[0] == 101


def test_text_from_a_pod_cannot_move_the_cursor(with_kind: ApiServer, tmp_path: Path) -> None:
    forged = {"manifest": "s3://b/\x1b[2J\x07m.json", "message": "\x1b[31mred\n::set-output", "groups": "\x1b[2J"}
    ended(with_kind, "Complete", **forged)
    for verb in (["status", "facts"], ["wait", "facts"], ["list"]):
        _, stdout, stderr = prism(with_kind, tmp_path, *verb)
        assert not {"\x1b", "\x07"} & {*stdout, *stderr}
        assert "\n::set-output" not in stdout + stderr


def test_status_shows_what_kueue_says_of_a_job_that_it_never_admits(with_kind: ApiServer, tmp_path: Path) -> None:
    """The message of a real Kueue (commit ff69552e79) about a pod larger than the whole of its ClusterQueue."""
    waits, too_large = "waits for Kueue's queue team-a", "insufficient quota for cpu in flavor plain"
    held = {"stage": "plan", "state": "Queued", "message": waits}
    ended(with_kind, "Planning", message=f"plan: {waits}", stages=[held])
    assert waits in prism(with_kind, tmp_path, "status", "facts")[1]
    kueue(with_kind, "v1beta1", "v1beta2", kind="Workload")
    reason = {"type": "QuotaReserved", "status": "False", "reason": "ExceedsMaxQuota", "message": too_large}
    workload(with_kind, suspended_job(with_kind, "facts-plan-0-0", "facts"), reason)
    code, text, err = prism(with_kind, tmp_path, "status", "facts")
    assert (code, f"{waits}: {too_large}" in text, err) == (0, True, "")
    status = json.loads(prism(with_kind, tmp_path, "status", "facts", "-o", "json")[1])["status"]
    assert status["stages"][0]["message"] == f"{waits}: {too_large}"
    assert status["message"] == f"plan: {waits}"


@pytest.mark.parametrize("name", ["", "a/b", "..", "A", "x" * 64])
def test_an_invalid_name_is_a_usage_error(server: ApiServer, tmp_path: Path, name: str) -> None:
    for verb in ("status", "wait", "cancel"):
        assert prism(server, tmp_path, verb, name)[0] == 2


def test_an_invalid_namespace_is_refused_before_any_request(server: ApiServer, tmp_path: Path) -> None:
    code, _, stderr = prism(server, tmp_path, "submit", "--wait", written(tmp_path), "-n", "a/../b")
    assert (code, "is not a valid namespace" in stderr) == (3, True)
    assert not server.requests


def test_an_unlabelled_config_map_is_not_a_record(server: ApiServer, tmp_path: Path) -> None:
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "facts-prism-record", "namespace": "default"}}
    server.create(body)
    assert prism(server, tmp_path, "status", "facts")[0] == 102


def test_submit_wait_without_the_rights_to_drive_a_run_names_them(server: ApiServer, tmp_path: Path) -> None:
    token = grant(server, ("", ["configmaps", "services"], ["*"]), ("batch", ["jobs"], ["*"]))
    code, _, stderr = prism(server, tmp_path, "submit", "--wait", written(tmp_path), token=token)
    assert code == 1
    assert "get, list, watch pods" in stderr
    assert "networkpolicies" in stderr


def test_who_may_only_create_runs_waits_for_the_operator(with_kind: ApiServer, tmp_path: Path) -> None:
    token = grant(with_kind, ("prism.dev", ["selectionruns"], ["*"]), ("", ["configmaps"], ["get"]))
    arguments = ("submit", "--wait", "--timeout", "1", written(tmp_path))
    code, _, stderr = prism(with_kind, tmp_path, *arguments, token=token)
    assert code == 101
    assert "waiting for an operator" in stderr


def test_a_document_that_the_api_server_refuses_is_invalid(with_kind: ApiServer, tmp_path: Path) -> None:
    """A rule of the kind that this version of the command does not know, say."""
    definition = with_kind.object("customresourcedefinitions", "selectionruns.prism.dev")
    assert definition is not None
    schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    schema["properties"]["spec"]["properties"]["store"]["maxLength"] = 3
    with_kind.update(definition)
    code, _, stderr = prism(with_kind, tmp_path, "submit", written(tmp_path))
    assert code == 3
    assert "the API server refuses the document" in stderr


def test_sigterm_ends_a_wait_at_once_with_a_hint_how_to_return(with_kind: ApiServer, tmp_path: Path) -> None:
    ended(with_kind, "Planning")
    process = start(with_kind.kubeconfig(tmp_path / "kubeconfig"), "wait", "facts")
    assert process.stderr is not None
    assert process.stderr.readline() == "Planning\n"
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "prism wait facts -n default" in stderr


def test_submit_over_an_invalid_record_names_it(server: ApiServer, tmp_path: Path) -> None:
    run = parse_for_cluster(yaml.safe_dump(DOCUMENT), "here")
    server.create(config_map_record(run, "kind: SelectionRun", "default"))
    code, _, stderr = prism(server, tmp_path, "submit", "--wait", written(tmp_path))
    assert code == 3
    assert "the run of that name in the cluster is not valid" in stderr


NAME = "  name: facts\n"
TEXT = "# why this run exists\n" + yaml.safe_dump(run_document("facts"))
TEXT = TEXT.replace(NAME, f"{NAME}  annotations: {{since: 2026-01-01}}\n")


def test_a_run_is_stored_as_written_without_defaults(with_kind: ApiServer, tmp_path: Path) -> None:
    """As `kubectl apply` does it: what a default is, the version that runs it says."""
    path = tmp_path / "facts.yaml"
    path.write_text(TEXT)
    assert prism(with_kind, tmp_path, "submit", str(path))[0] == 0
    stored = with_kind.object("selectionruns", "facts")
    assert stored is not None
    assert stored["spec"] == yaml.safe_load(TEXT)["spec"]
    assert stored["metadata"]["annotations"] == {"since": "2026-01-01"}
    code, _, stderr = prism(with_kind, tmp_path, "submit", str(path))
    assert (code, stderr.splitlines()[0]) == (0, "attached: default/facts")


@pytest.mark.parametrize(
    ("field", "value"), [("suspend", "no"), ("suspend", 1), ("retry", "3"), ("retry", True), ("selection", "4")]
)
def test_a_quoted_number_is_refused_before_any_request(field: str, value: Any, tmp_path: Path) -> None:
    """An API server refuses it; so does everything else that reads the document."""
    spec = {**DOCUMENT["spec"], field: value}
    if field == "selection":
        spec[field] = {"keep": "highest", "budget": {"count": value}}
    with pytest.raises(SpecError, match="without quotes"):
        parse_for_cluster(yaml.safe_dump({**DOCUMENT, "spec": spec}), "here")


def test_a_config_map_record_holds_the_text_as_written(server: ApiServer, tmp_path: Path) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text(TEXT)
    assert prism(server, tmp_path, "submit", "--wait", "--timeout", "0", str(path))[0] == 101
    stored = server.object("configmaps", "facts-prism-record")
    assert stored is not None
    assert stored["data"]["selection.yaml"] == TEXT


def test_a_403_for_a_kind_that_is_not_installed_is_not_an_error(server: ApiServer, tmp_path: Path) -> None:
    """A server judges what somebody may before whether there is such a kind: they are answered 403, not 404."""
    verbs = ["get", "list", "watch", "create", "patch", "delete"]
    token = grant(server, ("", ["configmaps", "pods"], verbs))
    assert prism(server, tmp_path, "list", token=token)[:2] == (0, "no runs\n")
    assert prism(server, tmp_path, "status", "facts", token=token)[0] == 102


@pytest.mark.parametrize("phase", ["Cancelled", "Planning"])
def test_a_run_that_is_deleted_while_it_is_cancelled_is_102_unless_it_was_cancelled_before(
    with_kind: ApiServer, tmp_path: Path, phase: str
) -> None:
    ended(with_kind, "Planning")
    with running(with_kind, tmp_path, "cancel", "facts") as cancelling:
        eventually(lambda: with_kind.requests["WATCH", "selectionruns"])
        found = with_kind.object("selectionruns", "facts")
        assert found is not None
        with with_kind.store.lock:  # both at once: no watcher sees the one without the other
            with_kind.update({**found, "status": {**found["status"], "phase": phase}}, subresource="status")
            with_kind.delete("selectionruns", "facts")
        stdout, stderr = cancelling.communicate(timeout=60)
    expected = (0, "facts: Cancelled\n") if phase == "Cancelled" else (102, "")
    assert (cancelling.returncode, stdout) == expected, stderr


@pytest.mark.parametrize(
    ("arguments", "is_about_runs"),
    [(["list"], True), (["status", "facts"], True), (["logs", "facts"], True), (["doctor"], False)],
)
def test_without_a_cluster_the_verbs_about_runs_say_where_local_ones_are(
    tmp_path: Path, arguments: list[str], is_about_runs: bool
) -> None:
    code, _, stderr = finish(start(tmp_path / "no-kubeconfig", *arguments))
    assert code == 1
    assert "no cluster to connect to" in stderr
    assert "set KUBECONFIG" in stderr
    assert ("what `prism run` ran has no record" in stderr) == is_about_runs


def test_a_kubeconfig_that_skips_verification_prints_no_warnings(tmp_path: Path) -> None:
    """The person's own choice; urllib3 would warn of it at every request."""
    authority = Authority(tmp_path / "certificates")
    pair = authority.sign("api", hosts=("127.0.0.1",))
    with ApiServer() as server:
        server.create(crd())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair.certificate, pair.key)
        server._http.socket = context.wrap_socket(server._http.socket, server_side=True)
        document = yaml.safe_load(server.kubeconfig(tmp_path / "kubeconfig").read_text())
        address = server.url.replace("http:", "https:")
        document["clusters"][0]["cluster"] = {"server": address, "insecure-skip-tls-verify": True}
        (tmp_path / "insecure").write_text(yaml.safe_dump(document))
        assert finish(start(tmp_path / "insecure", "list")) == (0, "no runs\n", "")


def test_a_server_dry_run_sends_every_object_and_creates_none(server: ApiServer, tmp_path: Path) -> None:
    code, stdout, stderr = prism(server, tmp_path, "render", "--dry-run=server", "-o", "json", written(tmp_path))
    assert code == 0, stderr
    kinds = [one["kind"] for one in json.loads(stdout)["items"]]
    assert kinds == ["ConfigMap", "NetworkPolicy", "Job", "Job", "Job", "Job"]
    assert f"the API server accepts all {len(kinds)} objects" in stderr
    assert not server.objects("jobs")


def test_a_server_dry_run_prints_the_warnings_of_pod_policies(server: ApiServer, tmp_path: Path) -> None:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    server.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "strict", "labels": labels}})
    overlay = {"spec": {"hostNetwork": True}}
    document = written(tmp_path, cluster={**DOCUMENT["spec"]["cluster"], "podOverlay": overlay})
    code, _, stderr = prism(server, tmp_path, "render", "--dry-run=server", "-n", "strict", document)
    assert code == 0
    assert "warning: " in stderr
    assert "host" in stderr


def test_an_api_server_that_does_not_answer_is_a_launcher_error(tmp_path: Path) -> None:
    with ApiServer() as server:
        kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
    started = time.monotonic()
    code, _, stderr = finish(start(kubeconfig, "list"))
    assert (code, "no answer from the API server" in stderr) == (1, True)
    assert time.monotonic() - started < 60


def test_a_schedule_that_the_server_refuses_changes_nothing(server: ApiServer, tmp_path: Path) -> None:
    """The CronJob of before must not run a new document."""
    metadata = {"name": "no-schedules", "namespace": "default"}
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": metadata}
    server.create({**quota, "spec": {"hard": {"count/cronjobs.batch": "0"}}})
    options = ["--cron", "0 3 * * *", "--image", "registry/prism@sha256:" + "0" * 64, "-n", "default", "--apply"]
    code, _, stderr = prism(server, tmp_path, "schedule", written(tmp_path), *options)
    assert code == 1, stderr
    assert "exceeded quota" in stderr
    assert server.objects("configmaps") == []


@pytest.mark.parametrize("arguments", [["submit", "selection.yaml"], ["retry", "facts"]], ids=lambda it: it[0])
def test_a_timeout_without_wait_is_a_usage_error(arguments: list[str], server: ApiServer, tmp_path: Path) -> None:
    arguments = [written(tmp_path) if it == "selection.yaml" else it for it in arguments]
    code, _, stderr = prism(server, tmp_path, *arguments, "--timeout", "5")
    assert code == 2, stderr
    assert "--timeout needs --wait" in stderr
