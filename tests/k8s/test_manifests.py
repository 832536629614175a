"""Laws of k8s/: valid on every version that we name, no right that nobody uses, and all of one piece."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import submit
from launcher.follow.logs.merged_logs import log_lines
from launcher.kube.cluster import Cluster
from launcher.kube.errors import Refused
from launcher.operator.controller import Controller
from launcher.resource import document as documents
from launcher.resource.names import LEASE, MANAGER, RUN_LABEL
from tests.cluster.rig import eventually, variables
from tests.cluster.server.apiserver import ApiServer
from tests.cluster.server.podsecurity import violations
from tests.k8s.validation import VERSIONS, validate

K8S = Path(__file__).parents[2] / "k8s"

Object = dict[str, Any]
Right = tuple[str, str, str]
"""(group, resource, verb)."""


def load(folder: Path) -> list[Object]:
    """The objects of a kustomization's files, as they are written."""
    files = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    return [found for file in files for found in yaml.safe_load_all((folder / file).read_text())]


@functools.cache
def built(folder: str) -> list[Object]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not on PATH")
    command = ["kubectl", "kustomize", str(K8S / folder)]
    return list(yaml.safe_load_all(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


CI_JOBS = [yaml.safe_load((K8S / f"examples/{name}-job.yaml").read_text()) for name in ("ci", "gate")]
INSTALLED, EXAMPLES = load(K8S), [*load(K8S / "examples"), *CI_JOBS]
EVERYTHING = [*INSTALLED, *EXAMPLES]


def title(found: Object) -> str:
    metadata = found["metadata"]
    return f"{found['kind']}/{metadata.get('name') or metadata['generateName']}"


def one(name: str, objects: list[Object] = EVERYTHING) -> Object:
    (found,) = (it for it in objects if title(it) == name)
    return found


def templates(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Every pod template."""
    for it in objects:
        spec = it.get("spec", {})
        template = spec.get("jobTemplate", {}).get("spec", spec).get("template")
        if template:
            yield title(it), template


def rights(*roles: str) -> list[Right]:
    return [
        (group, kind, verb)
        for role in roles
        for rule in one(role)["rules"]
        for group in rule["apiGroups"]
        for kind in rule["resources"]
        for verb in rule["verbs"]
    ]


# Valid, and of one piece


@pytest.mark.parametrize("found", EVERYTHING, ids=title)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid_on_every_version(found: Object, version: str) -> None:
    validate(found, version)


def test_kubectl_builds_what_the_files_say() -> None:
    objects = built(".")
    assert sorted(map(title, objects)) == sorted(map(title, INSTALLED))
    cluster_wide = ("Namespace", "CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding")
    assert {it["metadata"].get("namespace") for it in objects if it["kind"] not in cluster_wide} == {"prism-system"}
    (container,) = one("Deployment/prism-operator", objects)["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "registry/prism-operator:0.1.0"


def test_kubectl_builds_the_nightly_example_with_its_document() -> None:
    document = one("ConfigMap/nightly-selection", built("examples"))["data"]["selection.yaml"]
    assert document == (K8S / "examples/selection.yaml").read_text()
    documents.parse_for_cluster(document, "k8s/examples/selection.yaml")


@pytest.mark.parametrize("folder", [".", "examples"])
def test_what_kubectl_builds_is_valid_on_every_version(folder: str) -> None:
    for version, found in itertools.product(VERSIONS, built(folder)):
        validate(found, version)


def test_examples_are_not_installed_and_every_object_fits_an_annotation() -> None:
    """Client-side apply keeps a copy of each object in an annotation, of at most 262,144 bytes."""
    assert {"CronJob", "Job"}.isdisjoint(it["kind"] for it in INSTALLED)
    assert all(len(json.dumps(it)) < 131_072 for it in EVERYTHING)


def test_no_object_holds_a_secret() -> None:
    assert not [title(it) for it in EVERYTHING if it["kind"] == "Secret"]
    for name, template in templates(EVERYTHING):
        for container in template["spec"]["containers"]:
            assert all("value" not in variable for variable in container.get("env", ())), name


def test_nothing_passes_for_a_child_of_a_run() -> None:
    """A run's children are found by these labels."""
    for it in EVERYTHING:
        for labels in (it["metadata"].get("labels", {}), *(t["metadata"]["labels"] for _, t in templates([it]))):
            assert labels.get("app.kubernetes.io/name", "prism") == "prism"
            assert labels.get("app.kubernetes.io/managed-by") != MANAGER
            assert RUN_LABEL not in labels


# Pods


PODS = list(templates(EVERYTHING))
assert [name for name, _ in PODS] == [
    "Deployment/prism-operator",
    "CronJob/nightly-math",
    "Job/submit-selection-",
    "Job/diff-selection-",
]


@pytest.mark.parametrize("template", [template for _, template in PODS], ids=[name for name, _ in PODS])
def test_every_pod_is_restricted_and_bounded_and_can_write_to_tmp_alone(template: Object) -> None:
    spec = template["spec"]
    assert violations(spec) == []
    assert spec["securityContext"]["runAsUser"] > 0
    assert not {"initContainers", "ephemeralContainers"} & spec.keys()
    assert {kind for volume in spec["volumes"] for kind in volume if kind != "name"} <= {"configMap", "emptyDir"}
    (container,) = spec["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["resources"]["requests"].keys() == container["resources"]["limits"].keys() == {"cpu", "memory"}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    writable = [mount for mount in container["volumeMounts"] if not mount.get("readOnly")]
    assert [mount["mountPath"] for mount in writable] == ["/tmp"]
    assert volumes[writable[0]["name"]]["emptyDir"]["sizeLimit"]
    assert spec["enableServiceLinks"] is False


def test_the_namespace_enforces_the_restricted_profile() -> None:
    labels = one("Namespace/prism-system")["metadata"]["labels"]
    assert {labels[f"pod-security.kubernetes.io/{mode}"] for mode in ("enforce", "audit", "warn")} == {"restricted"}


def test_the_operator_is_found_by_its_service_and_its_budget_and_reached_where_it_answers() -> None:
    spec = one("Deployment/prism-operator")["spec"]
    labels = spec["template"]["metadata"]["labels"]
    (container,) = spec["template"]["spec"]["containers"]
    assert spec["replicas"] == 2
    assert spec["selector"]["matchLabels"] == labels
    assert one("PodDisruptionBudget/prism-operator")["spec"]["selector"]["matchLabels"] == labels
    service = one("Service/prism-operator-metrics")["spec"]
    assert service["selector"] == labels
    assert container["args"] == ["operator"]
    assert container["ports"] == [{"name": "http", "containerPort": 8080, "protocol": "TCP"}]
    assert [(port["port"], port["targetPort"]) for port in service["ports"]] == [(8080, "http")]
    policy = one("NetworkPolicy/prism-operator")["spec"]
    assert (policy["podSelector"], policy["policyTypes"]) == (spec["selector"], ["Ingress"])
    assert [port["port"] for rule in policy["ingress"] for port in rule["ports"]] == [8080]
    probes = {probe: container[probe]["httpGet"] for probe in ("livenessProbe", "readinessProbe")}
    assert probes == {
        "livenessProbe": {"path": "/healthz", "port": "http"},
        "readinessProbe": {"path": "/readyz", "port": "http"},
    }
    webhook = {"name": "prism-webhook", "optional": True}
    assert {it["name"]: it["valueFrom"] for it in container["env"]} == {
        "POD_NAME": {"fieldRef": {"fieldPath": "metadata.name"}},
        "POD_NAMESPACE": {"fieldRef": {"fieldPath": "metadata.namespace"}},
        "PRISM_WEBHOOK_URL": {"secretKeyRef": {**webhook, "key": "url"}},
        "PRISM_WEBHOOK_SECRET": {"secretKeyRef": {**webhook, "key": "secret"}},
    }


def test_operator_pods_meet_no_other_pods_of_the_namespace() -> None:
    labels = one("Deployment/prism-operator")["spec"]["selector"]["matchLabels"]
    for name, template in templates(EXAMPLES):
        assert not labels.items() <= template["metadata"]["labels"].items(), name


@pytest.mark.parametrize("name", ["CronJob/nightly-math", "Job/submit-selection-"])
def test_examples_submit_a_document_that_is_mounted_and_end_where_a_second_try_is_idle(name: str) -> None:
    spec = one(name)["spec"]
    job = spec.get("jobTemplate", {}).get("spec", spec)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"] == ["submit", "--wait", "/etc/prism/selection.yaml"]
    assert any(mount["mountPath"] == "/etc/prism" for mount in container["volumeMounts"])
    assert pod["restartPolicy"] == "Never"  # what a podFailurePolicy asks for
    ends, evicted = job["podFailurePolicy"]["rules"]
    # All of the command's codes but 0 done, 1 launcher error, 101 not finished, 130 and 143 stopped.
    assert ends["onExitCodes"]["values"] == [2, 3, 100, 102, 103]
    assert ends["onExitCodes"]["containerName"] == container["name"]
    assert evicted["action"] == "Ignore"
    if "jobTemplate" in spec:  # nights never overlap
        assert spec["concurrencyPolicy"] == "Forbid"
        assert spec["startingDeadlineSeconds"] >= 600


# Rights


AROUND = {("", "configmaps"), ("", "services"), ("networking.k8s.io", "networkpolicies")}

OPERATOR_CALLS: dict[str, set[Right]] = {
    "list and watch runs": {("prism.dev", "selectionruns", verb) for verb in ("get", "list", "watch")},
    "remove a run at the end of its time": {("prism.dev", "selectionruns", "delete")},
    "write how a run stands": {("prism.dev", "selectionruns/status", "patch")},
    "make what stands around Jobs, unless it is another's": {
        (*child, verb) for child in AROUND for verb in ("get", "create", "patch")
    },
    "make, watch and remove Jobs": {("batch", "jobs", verb) for verb in ("get", "list", "watch", "create", "delete")},
    "look at pods": {("", "pods", verb) for verb in ("get", "list", "watch")},
    "say why a Job has no pods": {("", "events", "list")},
    "tell of a transition": {("", "events", "create")},
}

VIEWER_CALLS: dict[str, set[Right]] = {
    "find runs of either kind": {
        *(("prism.dev", "selectionruns", verb) for verb in ("get", "list", "watch")),
        *(("", "configmaps", verb) for verb in ("get", "list")),
    },
    "find pods and show their logs": {
        *(("", "pods", verb) for verb in ("get", "list", "watch")),
        ("", "pods/log", "get"),
    },
    "say why a Job has no pods": {("", "events", "list")},
}

USER_CALLS = VIEWER_CALLS | {
    "make, cancel, retry and remove a run": {("prism.dev", "selectionruns", it) for it in ("create", "patch", "delete")}
}

DRIVER_CALLS = OPERATOR_CALLS | {
    "make, cancel, retry and suspend a run": {("prism.dev", "selectionruns", verb) for verb in ("create", "patch")},
    "keep a run in a ConfigMap": {("", "configmaps", verb) for verb in ("list", "watch", "delete")},
    "show logs": {("", "pods/log", "get")},
    "ask the server about a Job by a dry run": {("batch", "jobs", "patch")},
}


@pytest.mark.parametrize(
    ("role", "calls"),
    [
        ("ClusterRole/prism-operator", OPERATOR_CALLS),
        ("ClusterRole/prism-driver", DRIVER_CALLS),
        ("ClusterRole/prism-user", USER_CALLS),
        ("ClusterRole/prism-viewer", VIEWER_CALLS),
        (
            "Role/prism-operator-lease",
            {"lead": {("coordination.k8s.io", "leases", verb) for verb in ("get", "create", "update")}},
        ),
    ],
)
def test_a_role_grants_what_its_calls_need_and_no_more(role: str, calls: dict[str, set[Right]]) -> None:
    granted = rights(role)
    assert len(granted) == len(set(granted))
    assert set(granted) == set().union(*calls.values())


def test_whoever_may_edit_or_view_a_namespace_may_do_so_with_its_runs() -> None:
    prefix = "rbac.authorization.k8s.io/aggregate-to-"
    into = {
        title(role): [name.removeprefix(prefix) for name in role["metadata"]["labels"] if name.startswith(prefix)]
        for role in ROLES
    }
    assert {role: where for role, where in into.items() if where} == {
        "ClusterRole/prism-user": ["edit"],
        "ClusterRole/prism-viewer": ["view"],
    }


ROLES = [it for it in EVERYTHING if it["kind"] in ("Role", "ClusterRole")]
FORBIDDEN_KINDS = ("secrets", "pods/exec", "pods/attach", "pods/portforward", "serviceaccounts/token", "nodes/proxy")
BINDINGS = [it for it in EVERYTHING if it["kind"] in ("RoleBinding", "ClusterRoleBinding")]


@pytest.mark.parametrize("role", ROLES, ids=title)
def test_no_role_is_a_way_to_more_rights(role: Object) -> None:
    for group, kind, verb in rights(title(role)):
        assert "*" not in (group, kind, verb)
        assert kind not in FORBIDDEN_KINDS
        assert group != "rbac.authorization.k8s.io"
        assert verb not in ("escalate", "bind", "impersonate", "deletecollection")
    assert all("nonResourceURLs" not in rule for rule in role["rules"])


def test_the_operator_touches_no_lease_but_its_own() -> None:
    lease = one("Role/prism-operator-lease")["rules"]
    named = [(rule["verbs"], rule.get("resourceNames")) for rule in lease]
    assert named == [(["create"], None), (["get", "update"], [LEASE])]


def test_every_binding_joins_a_role_and_an_account_that_exist() -> None:
    accounts = {it["metadata"]["name"] for it in EVERYTHING if it["kind"] == "ServiceAccount"}
    for binding in BINDINGS:
        assert f"{binding['roleRef']['kind']}/{binding['roleRef']['name']}" in {title(role) for role in ROLES}
        assert {(subject["kind"], subject["name"] in accounts) for subject in binding["subjects"]} == {
            ("ServiceAccount", True)
        }
    for name, template in PODS:
        assert template["spec"]["serviceAccountName"] in accounts, name


def test_workers_have_no_right_and_no_token() -> None:
    workers = [it for it in EVERYTHING if title(it) == "ServiceAccount/prism-worker"]
    assert len(workers) == 2  # where PRISM is installed, and where the example runs
    assert all(it["automountServiceAccountToken"] is False for it in workers)
    subjects = [subject["name"] for binding in BINDINGS for subject in binding["subjects"]]
    assert "prism-worker" not in subjects
    assert "default" not in subjects


def test_the_driver_is_bound_where_it_works_and_nowhere_by_the_installation() -> None:
    assert not [it for it in INSTALLED if it["kind"].endswith("Binding") and "driver" in it["roleRef"]["name"]]
    assert one("RoleBinding/prism-driver")["roleRef"]["kind"] == "ClusterRole"
    assert not [it for it in EXAMPLES if it["kind"] == "ClusterRoleBinding"]


# The rights in use. Those of the operator and the driver: tests/cluster, whose rig runs them as these accounts


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    """Installed, and with a namespace that an example is applied to; no run's pods are ever started."""
    with ApiServer(log_folder=tmp_path / "logs") as server:
        server.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team-a"}})
        for objects, namespace in ((INSTALLED, "prism-system"), (EXAMPLES, "team-a")):
            for it in objects:
                if it["kind"] in ("Namespace", "CustomResourceDefinition", "ServiceAccount", *RIGHTS):
                    server.create(it, namespace=namespace)
        yield server


RIGHTS = ("Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding")


def as_account(server: ApiServer, folder: Path, account: str) -> Cluster:
    """A client that is this service account, `namespace:name`."""
    kubeconfig = server.kubeconfig(folder / account.replace(":", "-"), namespace="team-a", token=f"sa:{account}")
    with variables(KUBECONFIG=str(kubeconfig)):
        return Cluster()


def example(**spec: Any) -> submit.Document:
    document = yaml.safe_load((K8S / "examples/selection.yaml").read_text())
    document["spec"] |= spec
    return submit.read_document(yaml.safe_dump(document), "example", "")


def bind(server: ApiServer, role: str) -> str:
    """A service account of team-a that has a role there."""
    subject = {"kind": "ServiceAccount", "name": role, "namespace": "team-a"}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role}
    binding = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": role}}
    server.create({**binding, "roleRef": reference, "subjects": [subject]}, namespace="team-a")
    return f"team-a:{role}"


def test_the_users_role_is_enough_to_leave_a_run_to_the_operator_and_the_viewers_to_look(
    server: ApiServer, tmp_path: Path
) -> None:
    user = as_account(server, tmp_path, bind(server, "prism-user"))
    viewer = as_account(server, tmp_path, bind(server, "prism-viewer"))
    controller = Controller(as_account(server, tmp_path, "prism-system:prism-operator"), None)
    thread = threading.Thread(target=controller.run, daemon=True)
    thread.start()
    try:
        record = submit.submit(user, example(), "team-a").record
        eventually(lambda: submit.get_record(viewer, "team-a", "nightly-math").status.phase == "Planning", 20)
        assert [it.name for it in submit.list_records(viewer, "team-a")] == ["nightly-math"]
        assert list(log_lines(viewer, "team-a", "nightly-math", follow=False)) == []
        with pytest.raises(Refused):
            submit.cancel(viewer, record)
        submit.cancel(user, record)
        ended = submit.wait_until(user, record, submit.has_ended, timeout_seconds=20)
        assert ended
        assert ended.status.phase == "Cancelled"
        submit.run_again(user, ended)
    finally:
        controller.stop()
        thread.join(timeout=10)


def test_a_worker_may_ask_for_nothing(server: ApiServer, tmp_path: Path) -> None:
    worker = as_account(server, tmp_path, "team-a:prism-worker")
    for kind in ("SelectionRun", "Job", "Pod", "ConfigMap", "Event"):
        with pytest.raises(Refused):
            worker.list(kind, "team-a")
