"""What the objects of a run look like, whatever the run asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from launcher.render.pod import GPU
from launcher.render.run_objects import run_objects
from launcher.resource.document import pods_document
from launcher.resource.names import GROUP_LABEL, RUN_LABEL, STAGE_LABEL, labels_of_run
from launcher.resource.record import Record, config_map_record
from prism_job.errors import SpecError
from tests.cluster.server import podsecurity
from tests.k8s.validation import VERSIONS, validate
from tests.render.documents import (
    DOCUMENTS,
    OUR_LABELS,
    OWNER,
    Object,
    every_document,
    jobs_of,
    named,
    objects_of,
    run_of,
    template,
    worker_of,
)

# Valid everywhere


@every_document
@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid_on_every_version(document: str, version: str) -> None:
    for found in objects_of(document):
        validate(found, version)


@every_document
def test_the_same_run_gives_the_same_bytes_that_json_can_hold(document: str) -> None:
    assert len({(one["kind"], named(one)) for one in objects_of(document)}) == len(objects_of(document))
    first, second = (json.dumps(objects_of(document), allow_nan=False) for _ in range(2))
    assert first == second
    assert json.loads(first) == objects_of(document)


def test_the_stages_come_in_the_order_in_which_they_are_made() -> None:
    assert [(one["kind"], named(one)) for one in objects_of("everything")] == [
        ("ConfigMap", "demo-document"),
        ("NetworkPolicy", "prism-demo"),
        ("Job", "demo-plan-0-0"),
        ("Service", "prism-demo-0"),
        ("Job", "demo-extract-0-0-0"),
        ("Service", "prism-demo-1"),
        ("Job", "demo-extract-1-0-0"),
        ("Service", "prism-demo-2"),
        ("Job", "demo-extract-2-0-0"),
        ("Job", "demo-reduce-0-0"),
    ]


# Pod Security restricted, rule by rule

SPOILT: dict[str, Callable[[Object], object]] = {
    "host_namespaces": lambda pod: pod.update(hostIPC=True),
    "host_ports": lambda pod: pod["containers"][0].update(ports=[{"containerPort": 1, "hostPort": 1}]),
    "privileged": lambda pod: pod["containers"][0]["securityContext"].update(privileged=True),
    "privilege_escalation": lambda pod: pod["containers"][0]["securityContext"].pop("allowPrivilegeEscalation"),
    "capabilities": lambda pod: pod["containers"][0]["securityContext"].pop("capabilities"),
    "volume_types": lambda pod: pod["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
    "run_as_non_root": lambda pod: pod["securityContext"].pop("runAsNonRoot"),
    "run_as_user": lambda pod: pod["securityContext"].update(runAsUser=0),
    "seccomp": lambda pod: pod["securityContext"].pop("seccompProfile"),
    "proc_mount": lambda pod: pod["containers"][0]["securityContext"].update(procMount="Unmasked"),
    "selinux": lambda pod: pod["securityContext"].update(seLinuxOptions={"user": "root"}),
    "apparmor": lambda pod: pod["securityContext"].update(appArmorProfile={"type": "Unconfined"}),
    "sysctls": lambda pod: pod["securityContext"].update(sysctls=[{"name": "kernel.msgmax", "value": "1"}]),
    "windows_host_process": lambda pod: pod["securityContext"].update(windowsOptions={"hostProcess": True}),
}


def test_every_rule_of_the_profile_is_listed_here() -> None:
    assert set(SPOILT) == {rule.__name__ for rule in podsecurity.RULES}


@every_document
@pytest.mark.parametrize("rule", podsecurity.RULES, ids=lambda rule: str(rule.__name__))
def test_every_pod_passes_each_rule_of_restricted(document: str, rule: Callable[[Object], str]) -> None:
    for job in jobs_of(document):
        assert rule(template(job)["spec"]) == ""


@pytest.mark.parametrize("rule", podsecurity.RULES, ids=lambda rule: str(rule.__name__))
def test_each_rule_finds_a_pod_that_breaks_it(rule: Callable[[Object], str]) -> None:
    pod = template(jobs_of("everything")[0])["spec"]
    SPOILT[rule.__name__](pod)
    assert len(podsecurity.violations(pod)) == 1
    assert rule(pod)


@every_document
def test_every_pod_is_hardened_beyond_the_profile(document: str) -> None:
    for job in jobs_of(document):
        pod, container = template(job)["spec"], worker_of(job)
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert pod["restartPolicy"] == "Never"
        assert not any("token" in str(volume).lower() for volume in pod["volumes"])


@every_document
def test_every_writable_volume_has_a_size_limit(document: str) -> None:
    for job in jobs_of(document):
        volumes = {volume["name"]: volume for volume in template(job)["spec"]["volumes"]}
        mounts = {mount["mountPath"]: mount for mount in worker_of(job)["volumeMounts"]}
        for folder in ("/tmp", "/cache", "/dev/shm"):
            assert volumes[mounts[folder]["name"]]["emptyDir"]["sizeLimit"]
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        assert mounts["/etc/prism"]["readOnly"] is True
        environment = {one["name"]: one.get("value", "") for one in worker_of(job)["env"]}
        for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TMPDIR"):
            assert environment[name].startswith(("/cache", "/tmp")), name


def test_weights_on_a_claim_are_writable_and_shared_by_all_stages() -> None:
    for job in jobs_of("weights and a queue"):
        mounts = {mount["mountPath"]: mount for mount in worker_of(job)["volumeMounts"]}
        assert mounts["/cache/models"] == {"name": "models", "mountPath": "/cache/models"}
        assert mounts["/cache/huggingface"]["subPath"] == "huggingface"
        assert template(job)["spec"]["securityContext"]["fsGroup"] == 10001
    for job in jobs_of("minimal"):
        assert "fsGroup" not in template(job)["spec"]["securityContext"]


# What a Job asks for


@every_document
def test_gpu_requests_equal_limits_and_only_extraction_has_them(document: str) -> None:
    wanted = run_of(**DOCUMENTS[document]).spec.cluster
    assert wanted is not None
    for job in jobs_of(document):
        resources = worker_of(job)["resources"]
        asked, limit = resources["requests"].get(GPU), resources["limits"].get(GPU)
        in_extraction = "extract" in worker_of(job)["args"]
        assert asked == limit == (str(wanted.gpus_per_node) if in_extraction and wanted.gpus_per_node else None)
        assert resources["requests"]["memory"] == resources["limits"]["memory"] == wanted.memory


@every_document
def test_a_job_fails_with_its_first_failed_pod(document: str) -> None:
    for job in jobs_of(document):
        spec = job["spec"]
        assert spec["completions"] == spec["parallelism"]
        assert (spec["completionMode"], spec["backoffLimit"], spec["podReplacementPolicy"]) == ("Indexed", 0, "Failed")
        first, second = spec["podFailurePolicy"]["rules"]
        assert first["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
        assert second["onExitCodes"]["values"] == sorted(second["onExitCodes"]["values"]) == [64, 65]
        assert second["onExitCodes"]["containerName"] in [one["name"] for one in template(job)["spec"]["containers"]]
        assert {first["action"], second["action"]} == {"FailJob"}
        assert "ttlSecondsAfterFinished" not in spec  # the record's own end removes it


def test_every_child_names_the_record_as_its_owner() -> None:
    assert all(one["metadata"]["ownerReferences"] == [OWNER] for one in objects_of("everything"))
    unowned = run_objects(run_of(), "team")
    assert not any("ownerReferences" in one["metadata"] for one in unowned)


def test_every_child_is_found_by_the_labels_of_its_run() -> None:
    wanted = labels_of_run("demo").items()
    for one in objects_of("everything"):
        assert wanted <= one["metadata"]["labels"].items()
        if one["kind"] == "Job":
            assert wanted <= template(one)["metadata"]["labels"].items()


def test_a_label_of_the_document_never_replaces_ours() -> None:
    # Nor one that others go by: of who owns an object, which queue lets it in, what prunes it.
    theirs = {
        "prism.dev/record": "true",
        "prism.dev/round": "7",
        "kueue.x-k8s.io/queue-name": "fast",
        "app.kubernetes.io/instance": "app",
        "argocd.argoproj.io/instance": "app",
    }
    run = run_of(labels={RUN_LABEL: "another", **theirs, "team": "maths"}, nodesPerGroup=2)
    for one in run_objects(run, "team", OWNER):
        for metadata in (one["metadata"], template(one)["metadata"] if one["kind"] == "Job" else one["metadata"]):
            labels = metadata["labels"]
            assert (labels[RUN_LABEL], labels["team"]) == ("demo", "maths")
            assert {key: labels[key] for key in theirs if key in labels} in ({}, {"prism.dev/round": "0"})


@pytest.mark.parametrize(
    "labels",
    [
        {RUN_LABEL: "victim"},
        dict.fromkeys(OUR_LABELS),
        "none",
        None,
        {"$patch": "delete"},
        {"$patch": "replace", RUN_LABEL: "victim"},
        {"team": "maths", "x": 1},
    ],
)
@pytest.mark.parametrize("document", ["minimal", "one world of nodes"])
def test_no_overlay_takes_a_pod_from_its_run(document: str, labels: Any) -> None:
    run = run_of(**DOCUMENTS[document], podOverlay={"metadata": {"labels": labels}})
    for job in (one for one in run_objects(run, "team", OWNER) if one["kind"] == "Job"):
        ours = {key: job["metadata"]["labels"][key] for key in OUR_LABELS}
        assert ours[RUN_LABEL] == "demo"
        assert ours.items() <= template(job)["metadata"]["labels"].items()
    if isinstance(labels, dict) and "team" in labels:
        assert template(job)["metadata"]["labels"]["team"] == "maths"


def test_a_stored_record_renders_like_its_document() -> None:
    run = run_of(labels={"team": "maths", RUN_LABEL: "another"})
    document = run.to_document()
    stored = {**document, "metadata": {**document["metadata"], "namespace": "team", "uid": "u-1"}}
    config_map = config_map_record(run, yaml.safe_dump(run.to_document()), "team")
    for record in (stored, {**config_map, "metadata": {**config_map["metadata"], "uid": "u-1"}}):
        assert run_objects(Record(record).parse(), "team", OWNER) == run_objects(run, "team", OWNER)
        assert "labels" not in pods_document(Record(record).parse())["metadata"]
    stored["metadata"]["labels"]["odd"] = 3  # no API server stores it
    assert Record(stored).document["metadata"]["labels"] == {"team": "maths", RUN_LABEL: "another"}


def test_only_pods_of_the_run_may_connect_to_its_pods() -> None:
    (policy,) = (one for one in objects_of("everything") if one["kind"] == "NetworkPolicy")
    selector = {"matchLabels": labels_of_run("demo")}
    assert policy["spec"]["podSelector"] == selector
    assert policy["spec"]["ingress"] == [{"from": [{"podSelector": selector}]}]


def test_a_service_lists_the_nodes_of_its_group_before_they_are_ready() -> None:
    objects = objects_of("everything")
    assert not any(one["kind"] == "Service" for one in objects_of("groups alone")), "a world of one node needs none"
    for service in (one for one in objects if one["kind"] == "Service"):
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["publishNotReadyAddresses"] is True
        wanted = service["spec"]["selector"].items()
        (job,) = (it for it in jobs_of("everything") if wanted <= template(it)["metadata"]["labels"].items())
        assert template(job)["spec"]["subdomain"] == service["metadata"]["name"]
        master = next(word for word in worker_of(job)["args"] if word.startswith("--master="))
        assert master == f"--master={named(job)}-0.{service['metadata']['name']}:29500"


def test_the_queue_the_account_and_the_priority_reach_every_job() -> None:
    for job in jobs_of("everything"):
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
        assert template(job)["spec"]["serviceAccountName"] == "prism-worker"
        assert template(job)["spec"]["priorityClassName"] == "batch"
    for job in jobs_of("minimal"):
        assert "kueue.x-k8s.io/queue-name" not in job["metadata"]["labels"]
        assert not {"serviceAccountName", "priorityClassName", "subdomain"} & template(job)["spec"].keys()


# Arguments and environment


@every_document
def test_the_worker_parses_the_arguments_of_every_job(document: str) -> None:
    worker = pytest.importorskip("prism_job.__main__", reason="the job's packages are not installed")
    cluster = run_of(**DOCUMENTS[document]).spec.cluster
    assert cluster is not None
    for job in jobs_of(document):
        assert worker_of(job)["command"] == ["python", "-m", "prism_job"]
        arguments = [word.replace("$(JOB_COMPLETION_INDEX)", "0") for word in worker_of(job)["args"]]
        parsed = worker._parser().parse_args(arguments)
        assert (parsed.verb, parsed.spec) == (job["metadata"]["labels"][STAGE_LABEL], "/etc/prism/selection.yaml")
        if parsed.verb == "extract":
            assert (parsed.groups, parsed.nodes) == (cluster.groups, cluster.nodes_per_group)
            assert parsed.ranks == max(1, cluster.gpus_per_node)
            assert str(parsed.group) == job["metadata"]["labels"][GROUP_LABEL]


def test_a_variable_of_the_document_replaces_ours() -> None:
    for job in jobs_of("everything"):
        names = [one["name"] for one in worker_of(job)["env"]]
        assert len(set(names)) == len(names)
        assert {"name": "HF_HOME", "value": "/cache/elsewhere"} in worker_of(job)["env"]


# Secrets


def test_no_object_holds_the_value_of_a_secret() -> None:
    for job in jobs_of("everything"):
        (token,) = (one for one in worker_of(job)["env"] if one["name"] == "HF_TOKEN")
        assert token == {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
    literal = [
        value["name"]
        for one in objects_of("everything")
        for value in mappings(one)
        if "name" in value and "value" in value and re.search("TOKEN|SECRET|PASSWORD|KEY", str(value["name"]))
    ]
    assert not literal


@pytest.mark.parametrize("place", ["env", "containers", "initContainers"])
@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "PGPASSWORD"])
def test_a_literal_secret_is_refused_and_not_repeated(name: str, place: str) -> None:
    env = {"env": [{"name": name, "value": "c2VjcmV0"}]}
    cluster = env if place == "env" else {"podOverlay": {"spec": {place: [{"name": "worker", **env}]}}}
    with pytest.raises(SpecError, match="is a secret") as caught:
        run_of(**cluster)
    assert "c2VjcmV0" not in str(caught.value)


def mappings(value: Any) -> Iterator[Object]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from mappings(inner)
