"""Laws of the verbs that talk to a cluster, against the tests' API server alone: what they print, refuse and exit with."""

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
from tests.cluster.rig import eventually
from tests.cluster.server.apiserver import ApiServer

ROOT = Path(__file__).parents[2]
DOCUMENT = yaml.safe_load((ROOT / "examples/facts/cluster.yaml").read_text())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    with ApiServer(log_folder=tmp_path / "logs") as made:
        yield made


@pytest.fixture
def with_kind(server: ApiServer) -> ApiServer:
    server.create(crd())
    return server


def start(server: ApiServer, folder: Path, *arguments: str, token: str | None = None) -> subprocess.Popen[str]:
    env = {**os.environ, "KUBECONFIG": str(server.kubeconfig(folder / "kubeconfig", token=token))}
    command = [sys.executable, "-m", "launcher.cli.main", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)


def prism(server: ApiServer, folder: Path, *arguments: str, token: str | None = None) -> tuple[int, str, str]:
    process = start(server, folder, *arguments, token=token)
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


@contextlib.contextmanager
def running(server: ApiServer, folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = start(server, folder, *arguments)
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
def test_the_exit_code_is_how_it_ended(with_kind: ApiServer, tmp_path: Path, verb: str, phase: str, code: int) -> None:
    ended(with_kind, phase)
    assert prism(with_kind, tmp_path, verb, "facts")[0] == code


def test_a_run_that_is_not_there_is_102_and_one_that_goes_on_is_101(with_kind: ApiServer, tmp_path: Path) -> None:
    assert prism(with_kind, tmp_path, "wait", "facts")[0] == 102
    ended(with_kind, "Planning")
    assert prism(with_kind, tmp_path, "wait", "facts", "--timeout", "0.5")[0] == 101


def test_what_a_pod_said_moves_no_cursor(with_kind: ApiServer, tmp_path: Path) -> None:
    forged = {"manifest": "s3://b/\x1b[2J\x07m.json", "message": "\x1b[31mred\n::set-output", "groups": "\x1b[2J"}
    ended(with_kind, "Complete", **forged)
    for verb in (["status", "facts"], ["wait", "facts"], ["list"]):
        _, stdout, stderr = prism(with_kind, tmp_path, *verb)
        assert not {"\x1b", "\x07"} & {*stdout, *stderr}
        assert "\n::set-output" not in stdout + stderr


@pytest.mark.parametrize("name", ["", "a/b", "..", "A", "x" * 64])
def test_what_is_no_name_is_a_usage_error(server: ApiServer, tmp_path: Path, name: str) -> None:
    for verb in ("status", "wait", "cancel"):
        assert prism(server, tmp_path, verb, name)[0] == 2


def test_a_namespace_that_is_none_is_refused_before_anything_is_sent(server: ApiServer, tmp_path: Path) -> None:
    code, _, stderr = prism(server, tmp_path, "submit", "--wait", written(tmp_path), "-n", "a/../b")
    assert (code, "is no name of a namespace" in stderr) == (3, True)
    assert not server.requests


def test_a_config_map_of_somebody_elses_is_no_record(server: ApiServer, tmp_path: Path) -> None:
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "facts-prism-record", "namespace": "default"}}
    server.create(body)
    assert prism(server, tmp_path, "status", "facts")[0] == 102


def grant(server: ApiServer, *rules: tuple[str, str, list[str]]) -> str:
    """A token of an account with these rights: (group, resource, verbs)."""
    account = {"kind": "ServiceAccount", "name": "ci", "namespace": "default"}
    rbac, place = "rbac.authorization.k8s.io/v1", {"name": "ci", "namespace": "default"}
    server.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": place})
    granted = [{"apiGroups": [group], "resources": [resource], "verbs": verbs} for group, resource, verbs in rules]
    server.create({"apiVersion": rbac, "kind": "Role", "metadata": place, "rules": granted})
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "ci"}
    server.create(
        {"apiVersion": rbac, "kind": "RoleBinding", "metadata": place, "subjects": [account], "roleRef": role}
    )
    return "sa:default:ci"


def test_without_the_rights_to_carry_a_run_on_submit_wait_says_which_and_ends(
    server: ApiServer, tmp_path: Path
) -> None:
    token = grant(server, ("", "configmaps", ["*"]), ("batch", "jobs", ["*"]), ("", "services", ["*"]))
    code, _, stderr = prism(server, tmp_path, "submit", "--wait", written(tmp_path), token=token)
    assert code == 1
    assert "get, list, watch pods" in stderr
    assert "networkpolicies" in stderr


def test_a_person_who_may_only_make_runs_waits_for_the_operator(with_kind: ApiServer, tmp_path: Path) -> None:
    token = grant(with_kind, ("prism.dev", "selectionruns", ["*"]), ("", "configmaps", ["get"]))
    arguments = ("submit", "--wait", "--timeout", "1", written(tmp_path))
    code, _, stderr = prism(with_kind, tmp_path, *arguments, token=token)
    assert code == 101
    assert "waiting for an operator" in stderr


def test_what_the_api_server_refuses_is_a_wrong_document(with_kind: ApiServer, tmp_path: Path) -> None:
    """A rule of the kind that this version of the command does not know, say."""
    definition = with_kind.object("customresourcedefinitions", "selectionruns.prism.dev")
    assert definition is not None
    schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    schema["properties"]["spec"]["properties"]["store"]["maxLength"] = 3
    with_kind.update(definition)
    code, _, stderr = prism(with_kind, tmp_path, "submit", written(tmp_path))
    assert code == 3
    assert "the API server refuses the document" in stderr


def test_sigterm_leaves_a_wait_at_once_and_says_how_to_come_back(with_kind: ApiServer, tmp_path: Path) -> None:
    ended(with_kind, "Planning")
    process = start(with_kind, tmp_path, "wait", "facts")
    assert process.stderr is not None
    assert process.stderr.readline() == "Planning\n"
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "prism wait facts -n default" in stderr


def test_a_submit_that_takes_over_a_broken_record_says_so(server: ApiServer, tmp_path: Path) -> None:
    run = parse_for_cluster(yaml.safe_dump(DOCUMENT), "here")
    server.create(config_map_record(run, "kind: SelectionRun", "default"))
    code, _, stderr = prism(server, tmp_path, "submit", "--wait", written(tmp_path))
    assert code == 3
    assert "the run of that name in the cluster is not valid" in stderr


TEXT = """\
# why this run exists
apiVersion: prism.dev/v1alpha1
kind: SelectionRun
metadata: {name: facts, annotations: {since: 2026-01-01}}
spec:
  model: {uri: org/model}
  candidates: {uris: ["s3://corpora/pool/"]}
  targets: {uris: ["s3://corpora/targets.jsonl"]}
  store: s3://prism/store
  output: s3://prism/selections
  selection: {keep: highest, budget: {count: 4}}
  cluster: {image: "registry/prism:1"}
"""


def test_a_run_is_stored_as_it_was_written_without_any_default(with_kind: ApiServer, tmp_path: Path) -> None:
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
def test_a_number_in_quotes_is_refused_before_it_is_sent(field: str, value: Any, tmp_path: Path) -> None:
    """An API server refuses it; so does everything else that reads the document."""
    spec = {**DOCUMENT["spec"], field: value}
    if field == "selection":
        spec[field] = {"keep": "highest", "budget": {"count": value}}
    with pytest.raises(SpecError, match="without quotes"):
        parse_for_cluster(yaml.safe_dump({**DOCUMENT, "spec": spec}), "here")


def test_a_record_in_a_config_map_is_the_text_as_it_was_written(server: ApiServer, tmp_path: Path) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text(TEXT)
    assert prism(server, tmp_path, "submit", "--wait", "--timeout", "0", str(path))[0] == 101
    stored = server.object("configmaps", "facts-prism-record")
    assert stored is not None
    assert stored["data"]["selection.yaml"] == TEXT


def test_people_without_rights_to_a_kind_that_is_not_there_are_not_refused(server: ApiServer, tmp_path: Path) -> None:
    """A server judges what somebody may before whether there is such a kind: they are answered 403, not 404."""
    api, verbs = "rbac.authorization.k8s.io", ["get", "list", "watch", "create", "patch", "delete"]
    rules = [{"apiGroups": [""], "resources": ["configmaps", "pods"], "verbs": verbs}]
    role = {"apiVersion": f"{api}/v1", "kind": "Role", "metadata": {"name": "edit", "namespace": "default"}}
    server.create({**role, "rules": rules})
    reference, subject = {"apiGroup": api, "kind": "Role", "name": "edit"}, {"kind": "ServiceAccount", "name": "me"}
    server.create(
        {**role, "kind": "RoleBinding", "roleRef": reference, "subjects": [subject | {"namespace": "default"}]}
    )
    assert prism(server, tmp_path, "list", token="sa:default:me")[:2] == (0, "no runs\n")
    assert prism(server, tmp_path, "status", "facts", token="sa:default:me")[0] == 102


def test_a_cancelled_run_whose_record_goes_at_once_is_cancelled(with_kind: ApiServer, tmp_path: Path) -> None:
    ended(with_kind, "Planning")
    with running(with_kind, tmp_path, "cancel", "facts") as cancelling:
        eventually(lambda: with_kind.requests["WATCH", "selectionruns"])
        found = with_kind.object("selectionruns", "facts")
        assert found is not None
        with with_kind.store.lock:  # both at once: no watcher sees the one without the other
            with_kind.update({**found, "status": {**found["status"], "phase": "Cancelled"}}, subresource="status")
            with_kind.delete("selectionruns", "facts")
        stdout, stderr = cancelling.communicate(timeout=60)
    assert (cancelling.returncode, stdout) == (0, "facts: Cancelled\n"), stderr


def test_a_run_that_is_deleted_while_it_is_cancelled_is_102(with_kind: ApiServer, tmp_path: Path) -> None:
    ended(with_kind, "Planning")
    with running(with_kind, tmp_path, "cancel", "facts") as cancelling:
        eventually(lambda: with_kind.requests["WATCH", "selectionruns"])
        with_kind.delete("selectionruns", "facts")
        _, stderr = cancelling.communicate(timeout=60)
    assert cancelling.returncode == 102, stderr


def test_a_kubeconfig_that_skips_verification_floods_nobody(tmp_path: Path) -> None:
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
        env = {**os.environ, "KUBECONFIG": str(tmp_path / "insecure")}
        command = [sys.executable, "-m", "launcher.cli.main", "list"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "no runs\n", "")


def test_a_dry_run_of_the_server_sends_every_object_and_makes_none(server: ApiServer, tmp_path: Path) -> None:
    code, stdout, stderr = prism(server, tmp_path, "render", "--dry-run=server", "-o", "json", written(tmp_path))
    assert code == 0, stderr
    kinds = [one["kind"] for one in json.loads(stdout)["items"]]
    assert kinds == ["ConfigMap", "NetworkPolicy", "Job", "Job", "Job", "Job"]
    assert f"the API server accepts all {len(kinds)} objects" in stderr
    assert not server.objects("jobs")


def test_a_pods_policy_that_will_refuse_is_told_by_the_dry_run(server: ApiServer, tmp_path: Path) -> None:
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
    env = {**os.environ, "KUBECONFIG": str(kubeconfig)}
    command = [sys.executable, "-m", "launcher.cli.main", "list"]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=60, check=False)
    assert done.returncode == 1
    assert "no answer from the API server" in done.stderr
    assert time.monotonic() - started < 60
