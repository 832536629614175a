"""Laws of `prism doctor`: whatever would stop a run is named before it starts, and nothing is left behind."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.doctor import bucket_probe
from launcher.doctor.bucket_probe import probe_job, uris_of
from launcher.doctor.cluster_checks import examine
from launcher.doctor.findings import Finding, findings_table
from launcher.doctor.node_capacity import quantity
from launcher.kube.cluster import Cluster
from launcher.resource.crd import crd
from launcher.resource.document import parse_for_cluster
from launcher.resource.names import RUN_LABEL
from prism_job.spec.data import TargetsSpec
from prism_job.spec.document import SelectionRun
from tests.cluster.grants import ACCOUNT, bind
from tests.cluster.kueue import RELEASES, kueue
from tests.cluster.rig import Rig, rig
from tests.cluster.server.apiserver import ApiServer
from tests.cluster.server.podsecurity import violations
from tests.k8s.validation import validate
from tests.run_document import run_document

ROOT = Path(__file__).parents[2]
DIGEST = "registry/prism@sha256:" + "0" * 64


def run_of(**cluster: Any) -> SelectionRun:
    small = {"image": DIGEST, "gpusPerNode": 0, "cpu": "1", "memory": "1Gi"}
    return parse_for_cluster(yaml.safe_dump(run_document(bucket="cluster", **{**small, **cluster})), "test")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    with ApiServer() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        yield server


def as_account(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *roles: str) -> None:
    """From here on we are a service account with these cluster roles of k8s/rbac.yaml, in its namespace."""
    for role in yaml.safe_load_all((ROOT / "k8s" / "rbac.yaml").read_text()):
        if role and role["kind"] == "ClusterRole" and role["metadata"]["name"] in roles:
            server.create(role)
            bind(server, "ClusterRole", role["metadata"]["name"])
    token = f"sa:default:{ACCOUNT}"
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "account", token=token)))


def lease(server: ApiServer, age_seconds: float, holder: str = "operator-1") -> None:
    server.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "prism-system"}})
    renewed = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age_seconds)
    spec = {"holderIdentity": holder, "leaseDurationSeconds": 15, "renewTime": f"{renewed:%Y-%m-%dT%H:%M:%S.%fZ}"}
    metadata = {"name": "prism-operator", "namespace": "prism-system"}
    server.create({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec})


def node(
    server: ApiServer, name: str, *, ready: bool = True, labels: dict[str, str] | None = None, **room: str
) -> None:
    made = server.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels or {}}})
    allocatable = {"cpu": "8", "memory": "32Gi"} | {
        key.replace("gpus", "nvidia.com/gpu"): it for key, it in room.items()
    }
    condition = {"type": "Ready", "status": "True" if ready else "Unknown"}
    server.update({**made, "status": {"allocatable": allocatable, "conditions": [condition]}}, subresource="status")


def found(check: str, run: SelectionRun | None = None) -> list[Finding]:
    return [one for one in examine(Cluster(), "default", run, probe=False) if one.check == check]


def only(check: str, run: SelectionRun | None = None) -> Finding:
    (one,) = found(check, run)
    return one


def test_a_ready_cluster_has_no_problems(server: ApiServer) -> None:
    server.create(crd())
    lease(server, 3)
    node(server, "n")
    findings = examine(Cluster(), "default", run_of(), probe=False)
    assert [one.level for one in findings] == ["ok"] * len(findings), findings_table(findings)
    assert {"server", "kind", "operator", "rights", "image", "nodes", "policies"} == {one.check for one in findings}
    assert findings_table(findings).endswith("no problems found")


def test_nothing_is_created_without_the_probe(server: ApiServer) -> None:
    node(server, "n")
    examine(Cluster(), "default", run_of(), probe=False)
    assert server.objects("pods") == server.objects("jobs") == []


def test_an_unreachable_server_is_the_only_finding(server: ApiServer) -> None:
    with server.outage():
        (one,) = examine(Cluster(), "default", run_of(), probe=True)
    assert (one.level, one.check) == ("error", "server")


@pytest.mark.parametrize(
    ("version", "level"),
    [("v1.28.9", "error"), ("v1.29.0", "ok"), ("v1.37.1-gke.100", "ok"), ("v1.38.0", "warning"), ("odd", "warning")],
)
def test_old_and_new_server_versions_are_reported(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch, version: str, level: str
) -> None:
    monkeypatch.setattr(Cluster, "version", lambda _: version)
    assert only("server").level == level


def test_a_missing_namespace_is_an_error(server: ApiServer) -> None:
    findings = examine(Cluster(), "nowhere", None, probe=False)
    assert [one.level for one in findings if one.check == "namespace"] == ["error"]


def test_without_the_custom_resource_submit_wait_still_works(server: ApiServer) -> None:
    one = only("kind")
    assert one.level == "warning"
    assert "submit --wait" in one.fix
    assert found("operator") == []


def test_a_crd_of_another_version_is_reported_by_its_missing_fields(server: ApiServer) -> None:
    old = crd()
    spec = old["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    del spec["properties"]["cluster"]["properties"]["podOverlay"]
    server.create(old)
    one = only("kind")
    assert one.level == "warning"
    assert "spec.cluster.podOverlay" in one.detail


@pytest.mark.parametrize(
    ("age_seconds", "holder", "level", "says"),
    [
        (3, "op", "ok", "op leads"),
        (600, "op", "warning", "op last renewed its Lease 10m ago"),
        (3, "", "warning", "no operator leads"),
    ],
)
def test_an_operator_is_alive_if_its_lease_is_fresh(
    server: ApiServer, age_seconds: float, holder: str, level: str, says: str
) -> None:
    server.create(crd())
    lease(server, age_seconds, holder)
    one = only("operator")
    assert one.level == level
    assert says in one.detail


def test_a_driver_has_all_rights_and_is_shown_what_could_not_be_checked(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.create(crd())
    as_account(server, tmp_path, monkeypatch, "prism-driver")
    findings = examine(Cluster(), "default", run_of(serviceAccount="worker"), probe=False)
    by_check = {one.check: one for one in findings}
    assert by_check["rights"].level == "ok"
    assert "you may not read it" in by_check["operator"].detail
    assert by_check["nodes"].detail.startswith("not checked: ")
    assert by_check["service account"].detail.startswith("not checked: ")
    assert "you may not create pods" in by_check["policies"].detail
    assert not [one for one in findings if one.level == "error"]


def test_missing_rights_are_named(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_account(server, tmp_path, monkeypatch)
    rights = found("rights")
    errors = {one.detail for one in rights if one.level == "error"}
    assert "you may not get, list, watch, create, patch, delete jobs in default" in errors
    assert [one.detail for one in rights if one.level == "warning"] == [
        "you may not get pods/log in default",
        "you may not list, create events in default",
    ]


def test_with_an_operator_few_rights_are_needed(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.create(crd())
    lease(server, 3)
    as_account(server, tmp_path, monkeypatch)
    leases = [server.object("leases", "prism-operator", "prism-system")]
    monkeypatch.setattr("launcher.doctor.cluster_checks._leases", lambda *_: (leases, {}))
    errors = [one.detail for one in found("rights") if one.level == "error"]
    assert errors == ["you may not get, list, watch, create, patch, delete selectionruns in default"]


def test_an_unreadable_lease_is_a_warning_only(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.create(crd())
    as_account(server, tmp_path, monkeypatch, "prism-user")
    levels = {one.check: one.level for one in examine(Cluster(), "default", run_of(), probe=False)}
    assert (levels["operator"], "error" in levels.values()) == ("warning", False)
    assert "not known" in only("operator").detail


def test_an_image_by_tag_is_a_warning(server: ApiServer) -> None:
    assert only("image", run_of(image="registry/prism:1")).level == "warning"


def queue(server: ApiServer, name: str, active: str = "True", version: str = "v1beta1") -> None:
    condition = {"type": "Active", "status": active, "message": "its ClusterQueue is stopped"}
    metadata = {"name": name, "namespace": "default"}
    api = f"kueue.x-k8s.io/{version}"
    server.create(
        {"apiVersion": api, "kind": "LocalQueue", "metadata": metadata, "status": {"conditions": [condition]}}
    )


def test_a_missing_kueue_or_queue_is_an_error(server: ApiServer) -> None:
    run = run_of(queueName="gpu")
    assert "Kueue is not installed" in only("queue", run).detail
    kueue(server, "v1beta1", kind="Topology")  # the group without this kind
    assert "Kueue is not installed" in only("queue", run).detail
    kueue(server, "v1beta1")
    queue(server, "cpu")
    one = only("queue", run)
    assert (one.level, one.fix) == ("error", "use one of: cpu")
    queue(server, "gpu")
    assert only("queue", run).level == "ok"


@pytest.mark.parametrize("served", RELEASES.values(), ids=RELEASES.keys())
def test_a_stopped_queue_is_found_in_every_version_of_kueue_and_is_a_warning(
    server: ApiServer, served: tuple[str, ...]
) -> None:
    kueue(server, "v1alpha1", "v1", kind="Topology")  # the group prefers v1, which has no LocalQueue
    kueue(server, *served)
    queue(server, "gpu", active="False", version=served[0])
    cluster = Cluster()
    (one,) = [it for it in examine(cluster, "default", run_of(queueName="gpu"), probe=False) if it.check == "queue"]
    assert (one.level, "its ClusterQueue is stopped" in one.detail) == ("warning", True), one
    assert [text for text in cluster.warnings if "deprecated" in text] == []


def test_a_later_version_of_kueue_alone_is_named_in_a_warning(server: ApiServer) -> None:
    kueue(server, "v1", "v2alpha1")
    queue(server, "gpu", version="v1")
    one = only("queue", run_of(queueName="gpu"))
    assert (one.level, "kueue.x-k8s.io/v1, v2alpha1" in one.detail) == ("warning", True), one
    assert "upgrade PRISM" in one.fix


def test_a_version_that_is_no_longer_served_is_not_read(server: ApiServer) -> None:
    kueue(server, "v1beta1", "v1beta2")
    definition = server.object("customresourcedefinitions", "localqueues.kueue.x-k8s.io", namespace="")
    assert definition is not None
    definition["spec"]["versions"][0] |= {"served": False}
    server.update(definition)
    queue(server, "gpu", version="v1beta2")
    assert only("queue", run_of(queueName="gpu")).level == "ok"


def test_too_few_gpus_cpus_and_too_little_memory_are_reported_with_the_largest_node(server: ApiServer) -> None:
    node(server, "small", gpus="4")
    node(server, "away", gpus="8", ready=False)
    findings = found("nodes", run_of(gpusPerNode=8, cpu="9", memory="64Gi"))
    assert {one.level for one in findings} == {"warning"}
    text = "\n".join(one.detail for one in findings)
    for amount in ("8 nvidia.com/gpu", "4 nvidia.com/gpu", "9 cpu", "64 GiB memory"):
        assert amount in text


@pytest.mark.parametrize(
    ("cluster", "level", "says"),
    [
        ({"groups": 2}, "ok", "room for 2 pods"),
        ({"groups": 3}, "warning", "2 of 3 pods"),
        ({"nodesPerGroup": 2}, "ok", "room for 2 pods"),
        ({"nodesPerGroup": 3}, "warning", "a group needs 3 at once"),
    ],
)
def test_the_pods_of_all_groups_are_counted(server: ApiServer, cluster: dict[str, int], level: str, says: str) -> None:
    node(server, "a", gpus="8")
    node(server, "b", gpus="15")
    one = only("nodes", run_of(gpusPerNode=8, **cluster))
    assert (one.level, says in one.detail) == (level, True), one


def test_an_overlay_selects_nodes(server: ApiServer) -> None:
    node(server, "a", gpus="8", labels={"pool": "cpu"})
    node(server, "b", gpus="2", labels={"pool": "gpu"})
    assert only("nodes", run_of(gpusPerNode=4)).level == "ok"
    assert (
        only("nodes", run_of(gpusPerNode=4, podOverlay={"spec": {"nodeSelector": {"pool": "gpu"}}})).level == "warning"
    )


def test_objects_that_a_run_names_must_exist(server: ApiServer) -> None:
    run = run_of(
        serviceAccount="worker",
        weightsClaim="models",
        groups=2,
        env=[{"name": "AWS_SECRET_ACCESS_KEY", "valueFrom": {"secretKeyRef": {"name": "s3", "key": "secret"}}}],
    )
    assert [only(check, run).level for check in ("service account", "weights claim")] == ["error", "error"]
    assert "not read, by design: s3 (key secret)" in only("secrets", run).detail
    metadata = {"name": "worker", "namespace": "default"}
    server.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata})
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    metadata = {"name": "models", "namespace": "default"}
    server.create({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec})
    assert only("service account", run).level == "ok"
    assert "ReadWriteOnce" in only("weights claim", run).detail


def restrict(server: ApiServer) -> None:
    there = server.object("namespaces", "default", "")
    assert there
    labels = {**(there["metadata"].get("labels") or {}), "pod-security.kubernetes.io/enforce": "restricted"}
    server.update({**there, "metadata": {**there["metadata"], "labels": labels}})


def test_a_pod_refused_by_policy_is_an_error_with_the_reason(server: ApiServer) -> None:
    restrict(server)
    assert {one.level for one in found("policies", run_of())} == {"ok"}
    assert "restricted" in found("policies", run_of())[0].detail
    refused = found("policies", run_of(podOverlay={"spec": {"hostNetwork": True}}))
    assert [one.level for one in refused] == ["error", "error"]
    assert "host namespaces" in refused[0].detail


def test_without_the_right_to_create_pods_the_jobs_warnings_are_shown(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restrict(server)
    as_account(server, tmp_path, monkeypatch, "prism-driver")
    refused = found("policies", run_of(podOverlay={"spec": {"hostNetwork": True}}))
    assert {one.level for one in refused} == {"warning"}
    assert "host namespaces" in refused[0].detail


def test_a_transient_error_in_one_check_hides_no_other(server: ApiServer) -> None:
    node(server, "n")
    server.faults.script([({"plural": "nodes"}, "500")])
    findings = examine(Cluster(), "default", run_of(), probe=False)
    assert next(one for one in findings if one.check == "nodes").detail.startswith("not checked")
    assert findings[-1].check == "policies"


@pytest.mark.parametrize(
    ("text", "value"), [("500m", 0.5), ("8", 8), ("16Gi", 2**34), ("1k", 1000), ("2e3", 2000), ("x", 0), ("1.2.3", 0)]
)
def test_quantities_are_read_as_kubernetes_writes_them(text: str, value: float) -> None:
    assert quantity(text) == value


def test_a_table_shows_hints_and_no_control_characters() -> None:
    text = findings_table([Finding("error", "queue", "bad \x1b[2J\nname", "fix it"), Finding("ok", "image", "fine")])
    assert text.splitlines() == [
        "error    queue  bad \\x1b[2J name",
        "                hint: fix it",
        "ok       image  fine",
        "",
        "1 error",
    ]


def test_a_probe_is_a_small_restricted_pod_outside_the_run() -> None:
    run = run_of(gpusPerNode=4, queueName="gpu", weightsClaim="models", serviceAccount="worker")
    job = probe_job(run, "default")
    pod = job["spec"]["template"]["spec"]
    assert violations(pod) == []
    assert pod["serviceAccountName"] == "worker"
    assert pod["containers"][0]["resources"]["requests"] == {"cpu": "100m", "memory": "512Mi"}
    assert not {"document", "models"} & {one["name"] for one in pod["volumes"]}
    for labels in (job["metadata"]["labels"], job["spec"]["template"]["metadata"]["labels"]):
        assert RUN_LABEL not in labels
        assert "app.kubernetes.io/managed-by" not in labels
    assert probe_job(run, "default") == job


@pytest.mark.parametrize("version", ["1.29", "1.31", "1.33", "1.35"])
def test_each_version_of_kubernetes_has_the_probes_fields(version: str) -> None:
    validate(probe_job(run_of(), "default"), version)


def test_each_uri_is_tested_once() -> None:
    assert uris_of(run_of()) == [
        ("write", "s3://cluster/store"),
        ("write", "s3://cluster/selections"),
        ("read", "s3://cluster/pool/"),
        ("read", "s3://cluster/targets.jsonl"),
    ]
    sets = [{"name": name, "uris": ["s3://cluster/targets.jsonl", f"s3://cluster/{name}.jsonl"]} for name in ("a", "b")]
    targets = TargetsSpec.model_validate({"sets": sets})
    run = run_of()
    found = uris_of(run.model_copy(update={"spec": run.spec.model_copy(update={"targets": targets})}))
    assert found[3:] == [
        ("read", "s3://cluster/targets.jsonl"),
        ("read", "s3://cluster/a.jsonl"),
        ("read", "s3://cluster/b.jsonl"),
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig(tmp_path_factory.mktemp("rig"), Path("/no/model")) as made:
        yield made


def tried(rig: Rig, run: SelectionRun, *, cluster: Cluster | None = None, **options: Any) -> list[Finding]:
    return list(bucket_probe.try_buckets(cluster or rig.cluster(tries=3), "default", run, **options))


@pytest.mark.usefixtures("job_packages")
def test_the_probe_tests_each_uri_from_a_pod_and_leaves_nothing(whole: Rig) -> None:
    def keys() -> list[str]:  # servers of one process share what they store
        return [one["Key"] for one in whole.client.list_objects_v2(Bucket="cluster")["Contents"]]

    before = keys()
    findings = tried(whole, run_of())
    assert [one.level for one in findings] == ["ok"] * 4, findings_table(findings)
    assert "written, read and removed" in findings[0].detail
    assert whole.server.objects("jobs") == []
    assert keys() == before


@pytest.mark.usefixtures("job_packages")
def test_the_probe_names_the_uri_that_fails(whole: Rig) -> None:
    run = run_of()
    spec = run.spec.model_copy(update={"store": "s3://no-such-bucket/store"})
    candidates = run.spec.candidates.model_copy(update={"uris": ("s3://cluster/nothing/",)})
    changed = run.model_copy(update={"spec": spec.model_copy(update={"candidates": candidates})})
    levels = {one.detail.partition(": ")[0]: one.level for one in tried(whole, changed)}
    assert levels == {
        "s3://no-such-bucket/store": "error",
        "s3://cluster/selections": "ok",
        "s3://cluster/nothing/": "warning",
        "s3://cluster/targets.jsonl": "ok",
    }


def test_a_probe_that_cannot_start_is_explained_and_removed(whole: Rig) -> None:
    run = run_of(podOverlay={"spec": {"nodeSelector": {"pool": "none"}}})
    (one,) = tried(whole, run, deadline_seconds=3)
    assert one.level == "error"
    assert "Unschedulable" in one.detail
    assert whole.server.objects("jobs") == []


def test_an_image_that_is_not_a_worker_is_reported_with_its_last_lines(whole: Rig) -> None:
    overlay = {"spec": {"containers": [{"name": "worker", "env": [{"name": "PYTHONHOME", "value": "/nowhere"}]}]}}
    (one,) = tried(whole, run_of(podOverlay=overlay))
    assert one.level == "error"
    assert "the probe did not test all" in one.detail


@pytest.mark.usefixtures("job_packages")
def test_the_job_of_an_earlier_doctor_is_replaced(whole: Rig) -> None:
    left = probe_job(run_of(), "default")
    left["spec"]["suspend"] = True
    whole.server.create(left)
    assert [one.level for one in tried(whole, run_of())] == ["ok"] * 4


def test_missing_rights_to_create_jobs_are_a_warning(
    whole: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(whole.server.kubeconfig(tmp_path / "nobody", token="sa:default:nobody")))
    (one,) = tried(whole, run_of(), cluster=Cluster())
    assert one.level == "warning"
    assert one.detail.startswith("not tested: ")


def test_an_interrupted_probe_is_removed(whole: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bucket_probe.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tried(whole, run_of())
    assert all("deletionTimestamp" in one["metadata"] for one in whole.server.objects("jobs"))
