"""Laws of rendering: what the objects of a run look like, whatever the run asks for. No cluster, no clock."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launcher.render.attempt import Attempt
from launcher.render.job import job as job_of
from launcher.render.pod import GPU
from launcher.render.run_objects import run_objects, shared_objects
from launcher.render.service import services
from launcher.resource.document import parse_for_cluster, pods_document, request_digest
from launcher.resource.names import (
    ATTEMPT_LABEL,
    GROUP_LABEL,
    LONGEST_JOB_NAME,
    LONGEST_NAME,
    ROUND_LABEL,
    RUN_LABEL,
    STAGE_LABEL,
    job_name,
    labels_of_run,
)
from launcher.resource.record import Record, config_map_record
from prism_job.errors import SpecError
from prism_job.spec.document import SelectionRun, check_document, parse_spec
from tests.cluster.server import podsecurity
from tests.k8s.validation import VERSIONS, validate

Object = dict[str, Any]

OWNER = {"apiVersion": "prism.dev/v1alpha1", "kind": "SelectionRun", "name": "demo", "uid": "u-1", "controller": True}
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")

EVERYTHING: Object = {
    "groups": 3,
    "nodesPerGroup": 4,
    "gpusPerNode": 8,
    "cpu": "32",
    "memory": "256Gi",
    "sharedMemory": "16Gi",
    "scratch": "500Gi",
    "weightsClaim": "weights",
    "serviceAccount": "prism-worker",
    "env": [
        {"name": "AWS_ENDPOINT_URL", "value": "http://minio:9000"},
        {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}},
        {"name": "HF_HOME", "value": "/cache/elsewhere"},
    ],
    "queueName": "team-a",
    "priorityClass": "batch",
    "maxRestarts": 1,
    "startupTimeoutSeconds": 60,
    "podOverlay": {
        "spec": {
            "tolerations": [
                {"key": "gpu", "operator": "Exists"},
                {"key": "gpu", "operator": "Exists", "effect": "NoExecute"},
            ],
            "nodeSelector": {"pool": "h100"},
            "runtimeClassName": "nvidia",
            "volumes": [{"name": "corpus", "persistentVolumeClaim": {"claimName": "corpus"}}],
            "containers": [
                {"name": "worker", "volumeMounts": [{"name": "corpus", "mountPath": "/corpus", "readOnly": True}]},
                {
                    "name": "proxy",
                    "image": "registry/proxy:1",
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                },
            ],
        }
    },
}
OUR_LABELS = [*labels_of_run("demo"), STAGE_LABEL, GROUP_LABEL, ROUND_LABEL, ATTEMPT_LABEL]
DOCUMENTS = {
    "minimal": {},
    "everything": EVERYTHING,
    "groups alone": {"groups": 2, "gpusPerNode": 0},
    "one world of nodes": {"nodesPerGroup": 2, "gpusPerNode": 1},
    "weights and a queue": {"weightsClaim": "weights", "queueName": "team-a"},
}


def run_of(name: str = "demo", *, labels: dict[str, str] | None = None, **cluster: Any) -> SelectionRun:
    document = {
        "apiVersion": "prism.dev/v1alpha1",
        "kind": "SelectionRun",
        "metadata": {"name": name, "labels": labels or {}},
        "spec": {
            "model": {"uri": "org/model"},
            "candidates": {"uris": ["s3://bucket/pool/", "s3://bucket/größe 😀.jsonl"]},
            "targets": {"uris": ["s3://bucket/targets.jsonl"]},
            "store": "s3://bucket/store",
            "output": "s3://bucket/selections",
            "selection": {"keep": "highest", "budget": {"fraction": 0.1}},
            "cluster": {"image": "registry/prism@sha256:" + "0" * 64, **cluster},
        },
    }
    return parse_for_cluster(json.dumps(document, ensure_ascii=False), "test")


def objects_of(document: str) -> list[Object]:
    return run_objects(run_of(**DOCUMENTS[document]), "team", OWNER)


def jobs_of(document: str) -> list[Object]:
    return [one for one in objects_of(document) if one["kind"] == "Job"]


def template(job: Object) -> Object:
    return dict(job["spec"]["template"])


def worker_of(job: Object) -> Object:
    return next(one for one in template(job)["spec"]["containers"] if one["name"] == "worker")


def named(job: Object) -> str:
    return str(job["metadata"]["name"])


every_document = pytest.mark.parametrize("document", DOCUMENTS)


# Valid everywhere


@every_document
@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid_on_every_version(document: str, version: str) -> None:
    for found in objects_of(document):
        validate(found, version)


@every_document
def test_the_same_run_gives_the_same_bytes_that_json_can_hold(document: str) -> None:
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


@every_document
def test_no_two_objects_of_a_run_have_one_name(document: str) -> None:
    found = [(one["kind"], named(one)) for one in objects_of(document)]
    assert len(set(found)) == len(found)


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
def test_every_pod_keeps_each_rule_of_restricted(document: str, rule: Callable[[Object], str]) -> None:
    for job in jobs_of(document):
        assert rule(template(job)["spec"]) == ""


@pytest.mark.parametrize("rule", podsecurity.RULES, ids=lambda rule: str(rule.__name__))
def test_each_rule_sees_a_pod_that_breaks_it(rule: Callable[[Object], str]) -> None:
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
def test_what_is_written_goes_to_volumes_with_a_bound(document: str) -> None:
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
def test_requests_of_gpus_equal_their_limits_and_only_extraction_asks_for_them(document: str) -> None:
    wanted = run_of(**DOCUMENTS[document]).spec.cluster
    assert wanted is not None
    for job in jobs_of(document):
        resources = worker_of(job)["resources"]
        asked, limit = resources["requests"].get(GPU), resources["limits"].get(GPU)
        in_extraction = "extract" in worker_of(job)["args"]
        assert asked == limit == (str(wanted.gpus_per_node) if in_extraction and wanted.gpus_per_node else None)
        assert resources["requests"]["memory"] == resources["limits"]["memory"] == wanted.memory


@every_document
def test_a_job_is_a_gang_that_ends_with_its_first_dead_pod(document: str) -> None:
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


def test_a_label_of_the_document_never_takes_the_place_of_ours() -> None:
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


def test_an_object_of_a_run_is_rendered_as_its_document_is() -> None:
    run = run_of(labels={"team": "maths", RUN_LABEL: "another"})
    document = run.to_document()
    stored = {**document, "metadata": {**document["metadata"], "namespace": "team", "uid": "u-1"}}
    config_map = config_map_record(run, yaml.safe_dump(run.to_document()), "team")
    for record in (stored, {**config_map, "metadata": {**config_map["metadata"], "uid": "u-1"}}):
        assert run_objects(Record(record).parse(), "team", OWNER) == run_objects(run, "team", OWNER)
        assert "labels" not in pods_document(Record(record).parse())["metadata"]
    stored["metadata"]["labels"]["odd"] = 3  # no API server stores it
    assert Record(stored).document["metadata"]["labels"] == {"team": "maths", RUN_LABEL: "another"}


def test_ranks_of_a_run_may_reach_each_other_and_nobody_else_them() -> None:
    (policy,) = (one for one in objects_of("everything") if one["kind"] == "NetworkPolicy")
    selector = {"matchLabels": labels_of_run("demo")}
    assert policy["spec"]["podSelector"] == selector
    assert policy["spec"]["ingress"] == [{"from": [{"podSelector": selector}]}]


def test_a_service_points_at_the_nodes_of_its_group_before_they_are_ready() -> None:
    objects = objects_of("everything")
    for service in (one for one in objects if one["kind"] == "Service"):
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["publishNotReadyAddresses"] is True
        selected = [
            job
            for job in objects
            if job["kind"] == "Job"
            and service["spec"]["selector"].items() <= template(job)["metadata"]["labels"].items()
        ]
        (job,) = selected
        assert template(job)["spec"]["subdomain"] == service["metadata"]["name"]
        master = next(word for word in worker_of(job)["args"] if word.startswith("--master="))
        assert master == f"--master={named(job)}-0.{service['metadata']['name']}:29500"


def test_a_world_of_one_node_needs_no_service() -> None:
    assert not any(one["kind"] == "Service" for one in objects_of("groups alone"))


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
def test_the_worker_understands_the_arguments_that_it_is_given(document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = pytest.importorskip("prism_job.__main__", reason="the job's packages are not installed")
    understood: list[Any] = []

    def stage(run: SelectionRun, arguments: Any) -> dict[str, Any]:
        understood.append(arguments)
        return {}

    monkeypatch.setattr(worker, "STAGES", dict.fromkeys(("plan", "extract", "reduce"), stage))
    monkeypatch.setattr(worker, "_read_spec", lambda path: path)
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    monkeypatch.setattr(worker, "write_termination_message", lambda words: None)
    wanted = run_of(**DOCUMENTS[document]).spec.cluster
    assert wanted is not None
    for job in jobs_of(document):
        assert worker_of(job)["command"] == ["python", "-m", "prism_job"]
        arguments = [word.replace("$(JOB_COMPLETION_INDEX)", "0") for word in worker_of(job)["args"]]
        assert worker.main(arguments) == 0
        found = understood.pop()
        assert found.spec == "/etc/prism/selection.yaml"
        if found.verb == "extract":
            assert (found.groups, found.nodes) == (wanted.groups, wanted.nodes_per_group)
            assert found.ranks == max(1, wanted.gpus_per_node)
            assert str(found.group) == job["metadata"]["labels"]["prism.dev/group"]


def test_a_variable_of_the_document_takes_the_place_of_ours_and_none_comes_twice() -> None:
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


@pytest.mark.parametrize(
    "cluster",
    [
        {"env": [{"name": "AWS_SECRET_ACCESS_KEY", "value": "c2VjcmV0"}]},
        {"env": [{"name": "HF_TOKEN", "value": "c2VjcmV0"}]},
        {
            "podOverlay": {
                "spec": {"containers": [{"name": "worker", "env": [{"name": "HF_TOKEN", "value": "c2VjcmV0"}]}]}
            }
        },
        {
            "podOverlay": {
                "spec": {"initContainers": [{"name": "x", "env": [{"name": "PGPASSWORD", "value": "c2VjcmV0"}]}]}
            }
        },
    ],
)
def test_a_literal_secret_is_refused_and_not_repeated(cluster: Object) -> None:
    with pytest.raises(SpecError, match="is a secret") as caught:
        run_of(**cluster)
    assert "c2VjcmV0" not in str(caught.value)


def mappings(value: Any) -> Iterator[Object]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from mappings(inner)


# Names


def test_names_stay_within_their_limits_at_the_largest_numbers() -> None:
    # What the document allows at most; an attempt also counts suspensions, which nothing bounds.
    for groups, nodes in ((256, 4), (4, 256), (32, 32)):
        run = run_of("9" + "n" * (LONGEST_NAME - 1), groups=groups, nodesPerGroup=nodes)
        for stage, group in (("plan", 0), ("extract", groups - 1), ("reduce", 0)):
            attempt = Attempt(run, stage, group, 1_000_000, 99_999, "team", OWNER)
            job = job_of(attempt)
            name, last = named(job), job["spec"]["completions"] - 1
            assert DNS_LABEL.fullmatch(name)
            assert len(f"{name}-{last}") <= 63  # the host name of the last pod
            for service in services(attempt):
                assert DNS_1035.fullmatch(named(service))
                assert len(named(service)) <= 63
                assert len(f"{name}-0.{named(service)}.team.svc") <= 253
            for labels in (job["metadata"]["labels"], template(job)["metadata"]["labels"]):
                assert all(len(value) <= 63 and LABEL_VALUE.fullmatch(value) for value in labels.values())


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["plan", "extract", "reduce"]),
            st.integers(0, 255),
            st.integers(0, 1_000_000),
            st.integers(0, 99_999),
        ),
        min_size=2,
        max_size=20,
        unique=True,
    )
)
def test_each_attempt_has_a_name_of_its_own(places: list[tuple[Any, int, int, int]]) -> None:
    places = list({(stage, group if stage == "extract" else 0, *rest): None for stage, group, *rest in places})  # type: ignore[misc]
    for run in ("demo", "n" * LONGEST_NAME):
        names = [job_name(run, *place) for place in places]
        assert len(set(names)) == len(names)
        assert all(len(name) <= LONGEST_JOB_NAME and DNS_LABEL.fullmatch(name) for name in names)


PARTS = ["a", "b", "extract", "plan", "reduce", "prism", "document", "record", "0", "1", "00"]
RUNS = st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map("-".join).filter(lambda it: len(it) <= LONGEST_NAME)


@given(
    st.lists(
        st.tuples(
            RUNS,
            st.sampled_from(["plan", "extract", "reduce"]),
            st.integers(0, 2),
            st.sampled_from([0, 1, 10, 1_000_000]),
            st.sampled_from([0, 1, 10, 99_999]),
        ),
        min_size=2,
        max_size=30,
    )
)
@settings(deadline=None)
@example([("x", "extract", 0, 0, 0), ("x-extract-0", "plan", 0, 0, 0), ("x-extract", "extract", 0, 0, 0)])
@example([("a", "extract", 0, 0, 0), ("a-0", "extract", 0, 0, 0), ("a-0-0", "plan", 0, 0, 0)])
def test_no_two_runs_of_a_namespace_share_the_name_of_an_object(places: list[tuple[Any, ...]]) -> None:
    wanted = {(run, stage, group if stage == "extract" else 0, *rest) for run, stage, group, *rest in places}
    owners: dict[tuple[str, str], tuple[Any, ...]] = {}
    for run_name, stage, group, round_number, attempt in wanted:
        run = run_of(run_name, groups=3, nodesPerGroup=2)
        whole = Attempt(run, stage, group, round_number, attempt, "team", OWNER)
        job = job_of(whole)
        assert owners.setdefault(("Job", named(job)), (run_name, stage, group, round_number, attempt))[0] == run_name
        around = [*shared_objects(run, "team", OWNER), *services(whole)]
        for one in (config_map_record(run, "", "team"), *around):
            assert owners.setdefault((one["kind"], named(one)), (run_name,))[0] == run_name
    assert sum(kind == "Job" for kind, _ in owners) == len(wanted)


def test_usual_names_can_be_read() -> None:
    assert job_name("curate-math", "extract", 2, 0, 1) == "curate-math-extract-2-0-1"
    assert job_name("curate-math", "plan", 0, 3, 0) == "curate-math-plan-3-0"


@every_document
def test_labels_are_valid(document: str) -> None:
    for one in objects_of(document):
        assert all(LABEL_VALUE.fullmatch(value) for value in one["metadata"]["labels"].values())
        assert DNS_LABEL.fullmatch(named(one))


# The document that the pods read


@every_document
def test_pods_read_the_request_that_was_made(document: str) -> None:
    run, (config, *_) = run_of(**DOCUMENTS[document]), objects_of(document)
    read = parse_spec(config["data"]["selection.yaml"], "selection.yaml")
    assert request_digest(read) == request_digest(run)
    assert pods_document(read) == pods_document(run)


def test_what_may_change_while_a_run_exists_changes_nothing_that_pods_read() -> None:
    run = run_of(**EVERYTHING)
    changed = run.model_copy(
        update={"spec": run.spec.model_copy(update={"suspend": True, "retry": 4, "ttl_seconds_after_finished": 60})}
    )
    assert run_objects(changed, "team", OWNER) == run_objects(run, "team", OWNER)
    assert request_digest(changed) == request_digest(run)


def test_labels_and_annotations_are_no_part_of_the_request() -> None:
    assert request_digest(run_of(labels={"team": "maths"})) == request_digest(run_of())


# The overlay


def nested(levels: int, inner: Any = 1) -> Any:
    for _ in range(levels):
        inner = {"a": inner} if levels % 2 else [inner]
    return inner


@pytest.mark.parametrize(
    ("overlay", "says"),
    [
        ({"spec": nested(20)}, "is nested deeper than 20 levels"),
        ({"spec": nested(9_999)}, "is nested deeper than 20 levels"),
        ({"spec": nested(10_000)}, "is nested deeper than 20 levels"),
        ({"spec": {"x": "y" * 32_768}}, "has 32,785 bytes as JSON; at most 32,768"),
        ({"spec": [[]] * 40_000}, "has more than 32,768 entries"),
        ({"spec": float("nan")}, "not JSON compliant"),
        ({"spec": {(1, 2): 3}}, "is no JSON"),
    ],
)
def test_an_overlay_has_its_bounds(overlay: Object, says: str) -> None:
    document = run_of().to_document()
    document["spec"]["cluster"]["podOverlay"] = overlay
    with pytest.raises(SpecError, match=rf"spec\.cluster\.podOverlay: .*{says}"):
        check_document(document, "test")


def test_an_overlay_as_large_and_deep_as_may_be_is_taken() -> None:
    for overlay in ({"spec": nested(19)}, {"spec": {"a": nested(18)}}, {"spec": {"x": "y" * (32_768 - 17)}}):
        assert run_of(podOverlay=overlay).spec.cluster.pod_overlay == overlay  # type: ignore[union-attr]


def test_yaml_of_the_document_is_plain() -> None:
    config = objects_of("everything")[0]
    text = config["data"]["selection.yaml"]
    assert "größe 😀" in yaml.safe_load(text)["spec"]["candidates"]["uris"][1]
    assert "&id" not in text
