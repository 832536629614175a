"""What the rig's API server promises: it behaves as a real one was measured to, through the official client and kubectl."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3.exceptions
from kubernetes import client, config, dynamic, watch
from kubernetes.client.exceptions import ApiException

from tests.cluster import podsecurity
from tests.cluster.apiserver import ApiServer

GROUP, VERSION, PLURAL = "prism.dev", "v1alpha1", "selectionruns"
SOON_SECONDS = 15
"""A generous bound: what it waits for takes tenths of a second."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    before = threading.active_count()
    with ApiServer(log_folder=tmp_path / "logs") as server:
        yield server
    _until(lambda: threading.active_count() <= before, "threads are left behind")


@pytest.fixture
def api(server: ApiServer, tmp_path: Path) -> Iterator[client.ApiClient]:
    with _client(server, tmp_path) as api:
        yield api


@pytest.fixture
def core(api: client.ApiClient) -> client.CoreV1Api:
    return client.CoreV1Api(api)


@pytest.fixture
def batch(api: client.ApiClient) -> client.BatchV1Api:
    return client.BatchV1Api(api)


@pytest.fixture
def custom(server: ApiServer, api: client.ApiClient) -> client.CustomObjectsApi:
    server.create(definition())
    return client.CustomObjectsApi(api)


def _client(server: ApiServer, folder: Path, token: str | None = None) -> client.ApiClient:
    path = server.kubeconfig(folder / f"{(token or 'admin').replace(':', '-')}.yaml", token=token)
    return config.new_client_from_config(str(path))


def _until(holds: Callable[[], Any], text: str) -> None:
    ends = time.monotonic() + SOON_SECONDS
    while not holds():
        assert time.monotonic() < ends, text
        time.sleep(0.02)


def _refused(call: Callable[[], Any], code: int, text: str = "") -> ApiException:
    with pytest.raises(ApiException) as caught:
        call()
    assert caught.value.status == code, caught.value.body
    assert text in json.loads(caught.value.body)["message"]
    return caught.value


def definition(**spec: Any) -> dict[str, Any]:
    """A custom resource in the shape that ours has."""
    condition = {"type": "object", "properties": {"type": {"type": "string"}, "status": {"type": "string"}}}
    keyed = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
    uris = {"type": "array", "maxItems": 10, "items": {"type": "string", "maxLength": 100}}
    schema = {
        "type": "object",
        "required": ["spec"],
        "x-kubernetes-validations": [{"rule": "self.metadata.name.size() <= 40", "message": "name is too long"}],
        "properties": {
            "spec": {
                "type": "object",
                "required": ["model"],
                "x-kubernetes-validations": [
                    {
                        "rule": "self.model == oldSelf.model",
                        "message": "model is immutable",
                        "fieldPath": ".model",
                        "reason": "FieldValueForbidden",
                    },
                    {
                        "rule": "has(self.ttl) == has(oldSelf.ttl) && (!has(self.ttl) || self.ttl == oldSelf.ttl)",
                        "message": "ttl is immutable",
                    },
                    {
                        "rule": "has(self.overlay) == has(oldSelf.overlay)"
                        " && (!has(self.overlay) || self.overlay == oldSelf.overlay)",
                        "message": "overlay is immutable",
                    },
                    {"rule": "self.nodes * self.gpus <= 16", "message": "too many GPUs"},
                ],
                "properties": {
                    "model": {"type": "string", "minLength": 1, "maxLength": 100, "pattern": "^[a-z]+$"},
                    "keep": {"type": "string", "enum": ["highest", "lowest"]},
                    "nodes": {"type": "integer", "minimum": 1, "maximum": 8, "default": 1},
                    "gpus": {"type": "integer", "minimum": 0, "default": 0},
                    "ttl": {"type": "integer", "nullable": True},
                    "suspend": {"type": "boolean", "default": False},
                    "uris": {**uris, "x-kubernetes-validations": [{"rule": "self.all(u, u.startsWith('s3://'))"}]},
                    "overlay": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                    **spec,
                },
            },
            "status": {
                "type": "object",
                "properties": {
                    "phase": {"type": "string"},
                    "observedGeneration": {"type": "integer"},
                    "conditions": {"type": "array", "items": condition, **keyed},
                },
            },
        },
    }
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "schema": {"openAPIV3Schema": schema},
        "additionalPrinterColumns": [
            {"name": "Phase", "type": "string", "jsonPath": ".status.phase"},
            {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
        ],
    }
    names = {"plural": PLURAL, "singular": "selectionrun", "kind": "SelectionRun", "shortNames": ["sel"]}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {"group": GROUP, "scope": "Namespaced", "names": names, "versions": [version]},
    }


def run(name: str = "first", **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "default"}
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "SelectionRun",
        "metadata": metadata,
        "spec": {"model": "small", **spec},
    }


def job(name: str = "gang", *, owner: str = "", **spec: Any) -> dict[str, Any]:
    """A gang of two as PRISM renders it."""
    rules = [
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget"}]},
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [64, 65], "containerName": "worker"}},
    ]
    pod_spec = {"restartPolicy": "Never", "containers": [{"name": "worker", "image": "prism:1"}]}
    gang = {"completionMode": "Indexed", "completions": 2, "parallelism": 2, "backoffLimit": 0}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": "default", **owned(owner)},
        "spec": {**gang, "podFailurePolicy": {"rules": rules}, "template": {"spec": pod_spec}, **spec},
    }


def pod(name: str = "worker", *, owner: str = "", **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "default", **owned(owner)}
    containers = [{"name": "worker", "image": "prism:1"}]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": containers, **spec}}


def config_map(name: str = "settings", *, owner: str = "", **data: str) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "default", **owned(owner)}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def owned(uid: str) -> dict[str, Any]:
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": uid, "blockOwnerDeletion": True}
    return {"ownerReferences": [reference]} if uid else {}


def placed(server: ApiServer, body: dict[str, Any]) -> dict[str, Any]:
    """A pod on a node."""
    return server.create({**body, "spec": {**body["spec"], "nodeName": "node-0"}})


def applied(
    api: client.ApiClient, body: dict[str, Any], *, manager: str | None = "prism", **options: Any
) -> dict[str, Any]:
    """The raw answer of a server-side apply."""
    group, _, version = body["apiVersion"].rpartition("/")
    plural = {"Job": "jobs", "ConfigMap": "configmaps", "SelectionRun": PLURAL}[body["kind"]]
    status = options.pop("status", False)
    path = f"{'/apis/' + group if group else '/api'}/{version}/namespaces/default/{plural}/{body['metadata']['name']}"
    answer = api.rest_client.request(
        "PATCH",
        f"{api.configuration.host}{path}{'/status' if status else ''}?"
        + "&".join(f"{k}={v}" for k, v in options.items())
        + (f"&fieldManager={manager}" if manager else ""),
        headers={
            **api.default_headers,
            "Content-Type": "application/apply-patch+yaml",
            "Authorization": api.configuration.get_api_key_with_prefix("BearerToken") or "",
        },
        body=body,
    )
    raw = answer.read()
    if answer.status >= 400:
        raise ApiException(status=answer.status, reason=answer.reason, http_resp=None, body=raw.decode())
    return json.loads(raw)


# Versions, generations, the two halves of an object


def test_a_write_that_changes_nothing_keeps_the_resource_version(core: client.CoreV1Api) -> None:
    first = core.create_namespaced_config_map("default", config_map(a="1"))
    again = core.patch_namespaced_config_map("settings", "default", {"data": {"a": "1"}})
    replaced = core.replace_namespaced_config_map("settings", "default", config_map(a="1"))
    assert first.metadata.resource_version == again.metadata.resource_version == replaced.metadata.resource_version
    changed = core.patch_namespaced_config_map("settings", "default", {"data": {"a": "2"}})
    assert int(changed.metadata.resource_version) > int(first.metadata.resource_version)


def test_a_second_create_conflicts_and_a_missing_object_is_not_found(core: client.CoreV1Api) -> None:
    core.create_namespaced_config_map("default", config_map())
    error = _refused(lambda: core.create_namespaced_config_map("default", config_map()), 409)
    assert json.loads(error.body)["reason"] == "AlreadyExists"
    _refused(lambda: core.read_namespaced_config_map("none", "default"), 404, 'configmaps "none" not found')
    _refused(lambda: core.create_namespaced_config_map("nowhere", {"metadata": {"name": "x"}}), 404, "nowhere")


def test_only_a_changed_spec_raises_the_generation(custom: client.CustomObjectsApi) -> None:
    place = (GROUP, VERSION, "default", PLURAL)
    created = custom.create_namespaced_custom_object(*place, run())
    assert created["metadata"]["generation"] == 1
    labelled = custom.patch_namespaced_custom_object(*place, "first", {"metadata": {"labels": {"a": "b"}}})
    stated = custom.patch_namespaced_custom_object_status(*place, "first", {"status": {"phase": "Running"}})
    assert labelled["metadata"]["generation"] == stated["metadata"]["generation"] == 1
    changed = custom.patch_namespaced_custom_object(*place, "first", {"spec": {"suspend": True}})
    assert changed["metadata"]["generation"] == 2


def test_status_sent_to_the_main_endpoint_is_ignored_and_the_other_way_round(custom: client.CustomObjectsApi) -> None:
    place = (GROUP, VERSION, "default", PLURAL)
    created = custom.create_namespaced_custom_object(*place, {**run(), "status": {"phase": "Done"}})
    assert "status" not in created
    patch = {"spec": {"suspend": True}, "status": {"phase": "Running"}}
    main = custom.patch_namespaced_custom_object(*place, "first", patch)
    assert main["spec"]["suspend"]
    assert "status" not in main
    patch["spec"]["suspend"] = False
    status = custom.patch_namespaced_custom_object_status(*place, "first", patch)
    assert (status["spec"]["suspend"], status["status"]["phase"]) == (True, "Running")


@pytest.mark.parametrize("way", ["merge", "apply", "replace"])
def test_a_stale_resource_version_conflicts_also_on_status(
    way: str, custom: client.CustomObjectsApi, api: client.ApiClient
) -> None:
    place = (GROUP, VERSION, "default", PLURAL)
    stale = custom.create_namespaced_custom_object(*place, run())
    custom.patch_namespaced_custom_object(*place, "first", {"metadata": {"labels": {"a": "b"}}})
    metadata = {"name": "first", "resourceVersion": stale["metadata"]["resourceVersion"]}
    body = {**run(), "metadata": metadata, "status": {"phase": "Done"}}
    if way == "merge":
        _refused(lambda: custom.patch_namespaced_custom_object_status(*place, "first", body), 409, "modified")
    elif way == "apply":
        _refused(lambda: applied(api, body, status=True), 409, "modified")
    else:
        _refused(lambda: custom.replace_namespaced_custom_object_status(*place, "first", body), 409, "modified")
    free = {"status": {"phase": "Done"}}
    assert custom.patch_namespaced_custom_object_status(*place, "first", free)["status"]["phase"] == "Done"


def test_a_dry_run_is_judged_but_not_stored(core: client.CoreV1Api, batch: client.BatchV1Api) -> None:
    answer = core.create_namespaced_config_map("default", config_map(), dry_run="All")
    assert answer.metadata.uid
    _refused(lambda: core.read_namespaced_config_map("settings", "default"), 404)
    bad = job(name="x" * 62)
    _refused(lambda: batch.create_namespaced_job("default", bad, dry_run="All"), 422)


def test_too_large_objects_annotations_and_bad_labels_are_refused(core: client.CoreV1Api) -> None:
    _refused(lambda: core.create_namespaced_config_map("default", config_map(a="x" * 2_000_000)), 500, "too large")
    _refused(lambda: core.create_namespaced_config_map("default", config_map(a="x" * 4_000_000)), 413, "too large")
    long = {"metadata": {"name": "x", "annotations": {"a": "x" * 262_145}}}
    _refused(lambda: core.create_namespaced_config_map("default", long), 422, "262144")
    label = {"metadata": {"name": "x", "labels": {"a": "not valid!"}}}
    _refused(lambda: core.create_namespaced_config_map("default", label), 422, "valid label")
    _refused(lambda: core.create_namespaced_config_map("default", {"metadata": {"name": "Big"}}), 422, "lowercase")


def test_json_patch_and_strategic_patch_change_lists_by_their_keys(core: client.CoreV1Api, server: ApiServer) -> None:
    server.create(pod())
    image = [{"op": "replace", "path": "/spec/containers/0/image", "value": "prism:2"}]
    assert core.patch_namespaced_pod("worker", "default", image).spec.containers[0].image == "prism:2"
    body = {"spec": {"containers": [{"name": "worker", "image": "prism:3"}]}}
    patched = core.patch_namespaced_pod(
        "worker", "default", body, _content_type="application/strategic-merge-patch+json"
    )
    assert patched.spec.containers[0].image == "prism:3"
    assert patched.spec.containers[0].termination_message_path
    missing = [{"op": "remove", "path": "/metadata/labels/none"}]
    _refused(lambda: core.patch_namespaced_pod("worker", "default", missing), 422)


def test_events_are_the_same_in_both_groups(core: client.CoreV1Api, api: client.ApiClient) -> None:
    about = {"kind": "Job", "name": "gang", "namespace": "default"}
    event = {
        "metadata": {"name": "e"},
        "involvedObject": about,
        "reason": "Started",
        "message": "it runs",
        "type": "Normal",
    }
    core.create_namespaced_event("default", event)
    found = core.list_namespaced_event("default", field_selector="involvedObject.name=gang").items
    assert [one.message for one in found] == ["it runs"]
    newer = client.EventsV1Api(api).list_namespaced_event("default", _preload_content=False)
    assert json.loads(newer.data)["items"][0]["note"] == "it runs"


def test_a_lease_tells_its_times_to_the_microsecond(api: client.ApiClient) -> None:
    leases = client.CoordinationV1Api(api)
    leases.create_namespaced_lease("default", {"metadata": {"name": "leader"}, "spec": {"leaseDurationSeconds": 15}})

    def patch(text: str) -> Any:
        step = {"op": "add", "path": "/spec/renewTime", "value": text}
        return leases.patch_namespaced_lease("leader", "default", [step])

    _refused(lambda: patch("2026-01-01T00:00:00Z"), 400, "date-time")
    assert patch("2026-01-01T02:00:00.000001+02:00").spec.renew_time.isoformat() == "2026-01-01T00:00:00.000001+00:00"


def test_an_event_lies_in_the_namespace_that_it_speaks_of(core: client.CoreV1Api) -> None:
    event = {"metadata": {"name": "e"}, "involvedObject": {"kind": "Job", "name": "gang", "namespace": "elsewhere"}}
    _refused(lambda: core.create_namespaced_event("default", event), 422, "does not match event.namespace")


def test_nonsense_is_refused_without_harm(api: client.ApiClient) -> None:
    nonsense = [[], {"metadata": [1]}, {"metadata": {"name": 3}}, {"metadata": {"name": "x", "labels": {"a": 1}}}]
    nonsense += [{"metadata": {"name": "x"}, "spec": "text"}, {"metadata": {"name": "x"}, "spec": {"template": []}}]
    for body in nonsense:
        url, headers = (
            f"{api.configuration.host}/apis/batch/v1/namespaces/default/jobs",
            {"Content-Type": "application/json"},
        )
        answer = api.rest_client.request("POST", url, headers=headers, body=body)
        assert answer.status == 400, answer.read()


def test_lists_can_be_selected_and_paged(server: ApiServer, core: client.CoreV1Api) -> None:
    for place in range(7):
        server.create(
            {**config_map(f"c{place}"), "metadata": {"name": f"c{place}", "labels": {"half": str(place % 2)}}}
        )

    def names(answer) -> Any:
        return [item.metadata.name for item in answer.items]

    listed = core.list_namespaced_config_map("default", label_selector="half in (1),half!=0")
    assert names(listed) == ["c1", "c3", "c5"]
    assert names(core.list_namespaced_config_map("default", field_selector="metadata.name=c2")) == ["c2"]
    first = core.list_namespaced_config_map("default", limit=4)
    second = core.list_namespaced_config_map("default", limit=4, _continue=first.metadata._continue)
    assert names(first) + names(second) == [f"c{place}" for place in range(7)]
    server.compact()
    token = first.metadata._continue
    _refused(lambda: core.list_namespaced_config_map("default", limit=4, _continue=token), 410)


# Server-side apply


def test_an_apply_of_the_same_changes_nothing(api: client.ApiClient, server: ApiServer) -> None:
    for body in (job(), config_map(a="1")):
        first, second = applied(api, body), applied(api, body)
        assert first["metadata"]["resourceVersion"] == second["metadata"]["resourceVersion"]


def test_an_apply_needs_its_manager_and_an_api_version(api: client.ApiClient) -> None:
    _refused(lambda: applied(api, config_map(), manager=None), 422, "fieldManager")
    path = "/api/v1/namespaces/default/configmaps/settings?fieldManager=prism"
    headers = {"Content-Type": "application/apply-patch+yaml"}
    answer = api.rest_client.request("PATCH", f"{api.configuration.host}{path}", headers=headers, body={"data": {}})
    assert answer.status == 400


def test_another_managers_field_conflicts_unless_forced(api: client.ApiClient) -> None:
    applied(api, config_map(a="1", b="1"))
    error = _refused(lambda: applied(api, config_map(a="2"), manager="other"), 409, 'conflict with "prism"')
    assert json.loads(error.body)["details"]["causes"][0]["field"] == ".data.a"
    same = applied(api, config_map(b="1"), manager="third")
    assert same["data"] == {"a": "1", "b": "1"}
    forced = applied(api, config_map(a="2"), manager="other", force="true")
    assert forced["data"] == {"a": "2", "b": "1"}
    _refused(lambda: applied(api, config_map(a="1", b="1")), 409, 'conflict with "other"')
    again = [applied(api, config_map(a="2"), manager="other"), applied(api, config_map(b="1"), manager="third")]
    assert {answer["metadata"]["resourceVersion"] for answer in again} == {forced["metadata"]["resourceVersion"]}


def test_a_field_no_longer_applied_goes_if_nobody_else_owns_it(api: client.ApiClient, core: client.CoreV1Api) -> None:
    applied(api, config_map(mine="1", shared="1"))
    applied(api, config_map(shared="1"), manager="other")
    core.patch_namespaced_config_map("settings", "default", {"data": {"patched": "1"}})
    assert applied(api, config_map(x="1"))["data"] == {"shared": "1", "patched": "1", "x": "1"}


def test_applied_lists_merge_by_their_keys(api: client.ApiClient) -> None:
    first = job(suspend=True)
    first["spec"]["template"]["spec"]["nodeSelector"] = {"zone": "a"}
    applied(api, first)
    mine = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "gang"}}
    pinned = {"template": {"spec": {"containers": [{"name": "worker", "image": "prism:1"}]}}}
    both = applied(api, {**mine, "spec": pinned}, manager="other")
    assert len(both["spec"]["template"]["spec"]["containers"]) == 1
    side = {"template": {"spec": {"containers": [{"name": "side", "image": "x"}]}}}
    _refused(lambda: applied(api, {**mine, "spec": side}, manager="third"), 422, "field is immutable")


def test_conditions_of_two_managers_live_side_by_side(custom: Any, api: client.ApiClient, server: ApiServer) -> None:
    server.create(run())
    bare = {"apiVersion": f"{GROUP}/{VERSION}", "kind": "SelectionRun", "metadata": {"name": "first"}}
    one = {**bare, "status": {"conditions": [{"type": "Planned", "status": "True"}]}}
    two = {**bare, "status": {"conditions": [{"type": "Complete", "status": "False"}]}}
    applied(api, one, status=True)
    both = applied(api, two, status=True, manager="other")["status"]["conditions"]
    assert [condition["type"] for condition in both] == ["Planned", "Complete"]
    left = applied(api, {**bare, "status": {"phase": "Done"}}, status=True)["status"]
    assert left == {"conditions": [{"type": "Complete", "status": "False"}], "phase": "Done"}


def test_an_unknown_field_in_an_apply_is_a_server_error(custom: Any, api: client.ApiClient) -> None:
    for body in (run(colour="red"), job(colour="red")):
        _refused(lambda body=body: applied(api, body), 500, "field not declared in schema")


def test_the_owners_uid_in_the_body_keeps_the_dead_from_rising(api: client.ApiClient, server: ApiServer) -> None:
    uid = applied(api, config_map(a="1"))["metadata"]["uid"]
    body = {**config_map(a="1"), "metadata": {"name": "settings", "uid": uid}}
    assert applied(api, body)["metadata"]["uid"] == uid
    server.delete("configmaps", "settings")
    _refused(lambda: applied(api, body), 409, "uid mismatch")
    applied(api, config_map(a="1"))
    _refused(lambda: applied(api, body), 409, "Precondition failed: UID")


def test_an_apply_onto_a_job_that_is_being_deleted_succeeds(api: client.ApiClient, batch: client.BatchV1Api) -> None:
    applied(api, {**job(), "metadata": {"name": "gang", "finalizers": ["prism.dev/keep"]}})
    batch.delete_namespaced_job("gang", "default", propagation_policy="Background")
    answer = applied(
        api, {**job(), "metadata": {"name": "gang", "finalizers": ["prism.dev/keep"], "labels": {"a": "b"}}}
    )
    assert answer["metadata"]["deletionTimestamp"]


def test_the_custom_objects_api_returns_nothing_when_an_apply_creates(custom: client.CustomObjectsApi) -> None:
    place, kind = (GROUP, VERSION, "default", PLURAL, "first"), {"_content_type": "application/apply-patch+yaml"}
    assert custom.patch_namespaced_custom_object(*place, run(), field_manager="prism", **kind) is None
    assert custom.patch_namespaced_custom_object(*place, run(), field_manager="prism", **kind)["metadata"]["uid"]


def test_the_dynamic_client_applies(api: client.ApiClient) -> None:
    dynamics = dynamic.DynamicClient(api)
    kind = dynamics.resources.get(api_version="batch/v1", kind="Job")
    answer = dynamics.server_side_apply(kind, job(), name="gang", namespace="default", field_manager="prism")
    assert answer.metadata.generation == 1


# Watches


def test_a_watch_from_the_lists_version_misses_nothing_and_ends_quietly(core: client.CoreV1Api) -> None:
    core.create_namespaced_config_map("default", config_map("before"))
    version = core.list_namespaced_config_map("default").metadata.resource_version
    core.create_namespaced_config_map("default", config_map("after"))
    core.delete_namespaced_config_map("after", "default")
    stream = watch.Watch().stream(
        core.list_namespaced_config_map, "default", resource_version=version, timeout_seconds=1
    )
    assert [(event["type"], event["object"].metadata.name) for event in stream] == [
        ("ADDED", "after"),
        ("DELETED", "after"),
    ]


def test_a_watch_sees_objects_come_into_and_leave_its_selection(core: client.CoreV1Api) -> None:
    version = core.list_namespaced_config_map("default").metadata.resource_version
    core.create_namespaced_config_map("default", config_map())
    for value in ("yes", "no"):
        core.patch_namespaced_config_map("settings", "default", {"metadata": {"labels": {"mine": value}}})
    options = {"resource_version": version, "timeout_seconds": 1, "label_selector": "mine=yes"}
    stream = watch.Watch().stream(core.list_namespaced_config_map, "default", **options)
    assert [event["type"] for event in stream] == ["ADDED", "DELETED"]


def test_a_version_long_forgotten_is_410(core: client.CoreV1Api, server: ApiServer) -> None:
    def events(version: str) -> list[Any]:
        options = {"resource_version": version, "timeout_seconds": 1}
        return list(watch.Watch().stream(core.list_namespaced_config_map, "default", **options))

    with pytest.raises(ApiException) as caught:
        events("1")
    assert caught.value.status == 410
    version = core.list_namespaced_config_map("default").metadata.resource_version
    server.compact()
    with pytest.raises(ApiException) as caught:
        events(version)
    assert caught.value.status == 410


def _raw_watch(core: client.CoreV1Api, **query: Any) -> list[dict[str, Any]]:
    answer = core.list_namespaced_config_map("default", watch=True, _preload_content=False, **query)
    return [json.loads(line) for line in answer.read().splitlines()]


def test_bookmarks_come_before_a_watch_ends_and_after_the_initial_events(core: client.CoreV1Api) -> None:
    core.create_namespaced_config_map("default", config_map())
    events = _raw_watch(core, allow_watch_bookmarks=True, timeout_seconds=1)
    assert [event["type"] for event in events] == ["ADDED", "BOOKMARK"]
    options = {"send_initial_events": True, "resource_version_match": "NotOlderThan", "allow_watch_bookmarks": True}
    events = _raw_watch(core, **options, timeout_seconds=1)
    assert events[1]["object"]["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}


def test_a_dropped_watch_is_no_api_exception(core: client.CoreV1Api, server: ApiServer) -> None:
    threading.Timer(0.3, server.drop_watches).start()
    with pytest.raises(urllib3.exceptions.ProtocolError):
        list(watch.Watch().stream(core.list_namespaced_config_map, "default", timeout_seconds=30))


def test_bad_weather_ends_watches_with_410_or_a_cut(core: client.CoreV1Api, server: ApiServer) -> None:
    server.faults.script([({"verb": "watch"}, "gone_watch"), ({"verb": "watch"}, "drop_watch")])
    events = _raw_watch(core, timeout_seconds=30)
    assert (events[-1]["type"], events[-1]["object"]["code"]) == ("ERROR", 410)
    with pytest.raises(urllib3.exceptions.ProtocolError):
        _raw_watch(core, timeout_seconds=30)


# Definitions and their objects


def test_an_established_definition_serves_its_kind_until_it_is_deleted(
    custom: client.CustomObjectsApi, api: client.ApiClient, server: ApiServer
) -> None:
    extensions = client.ApiextensionsV1Api(api)
    read = extensions.read_custom_resource_definition(f"{PLURAL}.{GROUP}")
    assert {condition.type for condition in read.status.conditions} == {"Established", "NamesAccepted"}
    custom.create_namespaced_custom_object(GROUP, VERSION, "default", PLURAL, run())
    extensions.delete_custom_resource_definition(f"{PLURAL}.{GROUP}")
    _until(lambda: not server.objects("customresourcedefinitions"), "the definition stays")
    with pytest.raises(ApiException) as caught:
        custom.list_namespaced_custom_object(GROUP, VERSION, "default", PLURAL)
    assert (caught.value.status, caught.value.body) == (404, "404 page not found\n")


def test_defaults_are_filled_in_and_unknown_fields_dropped_unless_strict(custom: client.CustomObjectsApi) -> None:
    place = (GROUP, VERSION, "default", PLURAL)
    made = custom.create_namespaced_custom_object(*place, run(colour="red", overlay={"any": {"thing": 1}}, ttl=None))
    assert made["spec"]["nodes"] == 1
    assert made["spec"]["overlay"] == {"any": {"thing": 1}}
    assert "colour" not in made["spec"]

    def strict() -> Any:
        return custom.create_namespaced_custom_object(*place, run("b", colour="red"), field_validation="Strict")

    _refused(strict, 400, 'unknown field "spec.colour"')


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({"model": 3}, "must be of type string"),
        ({"model": "UPPER"}, "should match"),
        ({"model": "a" * 101}, "Too long"),
        ({"keep": "best"}, 'supported values: "highest", "lowest"'),
        ({"nodes": 0}, "greater than or equal to 1"),
        ({"nodes": None, "suspend": "yes"}, "must be of type boolean"),
        ({"uris": ["s3://x"] * 11}, "Too many"),
        ({"uris": ["/tmp"]}, "failed rule"),
        ({"nodes": 8, "gpus": 8}, "too many GPUs"),
    ],
)
def test_nonsense_in_a_custom_resource_is_refused(
    spec: dict[str, Any], text: str, custom: client.CustomObjectsApi
) -> None:

    def make() -> Any:
        return custom.create_namespaced_custom_object(GROUP, VERSION, "default", PLURAL, run(**spec))

    error = _refused(make, 422, text)
    assert json.loads(error.body)["details"]["causes"]


def test_rules_hold_fields_fixed_and_bound_the_name(custom: client.CustomObjectsApi) -> None:
    place = (GROUP, VERSION, "default", PLURAL)
    custom.create_namespaced_custom_object(*place, run(overlay={"free": [1, {"any": 1}]}))

    def patch(**spec: Any) -> Any:
        return custom.patch_namespaced_custom_object(*place, "first", {"spec": spec})

    _refused(lambda: patch(model="large"), 422, "spec.model: Forbidden: model is immutable")
    _refused(lambda: patch(ttl=5), 422, "ttl is immutable")
    _refused(lambda: patch(overlay={"free": [1, {"any": "1"}]}), 422, "overlay is immutable")
    assert patch(suspend=True)["spec"]["suspend"]
    _refused(lambda: custom.create_namespaced_custom_object(*place, run("n" * 41)), 422, "name is too long")


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ({"$ref": "#/x"}, "$ref"),
        ({}, "must not be empty for specified object fields"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "must not be empty"),
        ({"type": "array"}, "items: Required"),
        ({"type": "object", "properties": {}, "additionalProperties": {"type": "string"}}, "mutual exclusive"),
        ({"type": "object", "additionalProperties": False}, "cannot be set to false"),
        ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, "uniqueItems"),
        ({"type": "integer", "default": "x"}, "must be of type integer"),
        (
            {
                "type": "array",
                "items": {"type": "string", "x-kubernetes-validations": [{"rule": "self == oldSelf"}]},
            },
            "oldSelf cannot be used",
        ),
        (
            {
                "type": "array",
                "items": {"type": "string"},
                "x-kubernetes-validations": [{"rule": "self.all(u, u.matches('^s3:'))"}],
            },
            "exceeds budget",
        ),
        (
            {"type": "object", "properties": {}, "x-kubernetes-validations": [{"rule": "has(self.nowhere)"}]},
            "undefined field 'nowhere'",
        ),
    ],
)
def test_a_schema_that_is_not_structural_is_refused(field: dict[str, Any], text: str, api: client.ApiClient) -> None:
    body = definition(extra=field)
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    answer = api.rest_client.request(
        "POST", f"{api.configuration.host}{path}", headers={"Content-Type": "application/json"}, body=body
    )
    assert (answer.status, text in json.loads(answer.read())["message"]) == (422, True)


# Jobs and pods as the server judges them


def _with(**changes: Any) -> dict[str, Any]:
    body = job(**{key: value for key, value in changes.items() if key not in ("codes", "container", "restart", "name")})
    codes = body["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]
    codes["values"] = changes.get("codes", codes["values"])
    codes["containerName"] = changes.get("container", "worker")
    body["spec"]["template"]["spec"]["restartPolicy"] = changes.get("restart", "Never")
    body["metadata"]["name"] = changes.get("name", "gang")
    return body


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (_with(codes=[65, 64]), "must be ordered"),
        (_with(codes=[0, 64]), "must not be 0 for the In operator"),
        (_with(container="other"), "must be one of the container"),
        (_with(restart="OnFailure"), 'only "Never" is supported'),
        (_with(podReplacementPolicy="TerminatingOrFailed"), 'supported values: "Failed"'),
        (_with(name="n" * 62), "invalid DNS label"),
    ],
)
def test_a_job_that_a_real_server_refuses_is_refused(body: dict[str, Any], text: str, batch: client.BatchV1Api) -> None:
    _refused(lambda: batch.create_namespaced_job("default", body), 422, text)


def test_a_job_of_the_longest_name_is_accepted(batch: client.BatchV1Api) -> None:
    batch.create_namespaced_job("default", _with(name="n" * 61))


def test_template_and_failure_policy_of_a_job_are_fixed_its_limit_and_suspension_not(batch: client.BatchV1Api) -> None:
    batch.create_namespaced_job("default", job())

    def patch(**spec: Any) -> Any:
        return batch.patch_namespaced_job("gang", "default", {"spec": spec})

    image = {"spec": {"containers": [{"name": "worker", "image": "prism:2"}]}}
    _refused(lambda: patch(template=image), 422, "field is immutable")
    _refused(lambda: patch(podFailurePolicy={"rules": [{"action": "Ignore", "onPodConditions": []}]}), 422, "immutable")
    _refused(lambda: batch.replace_namespaced_job("gang", "default", job()), 422, "spec.selector")
    changed = patch(backoffLimit=3, suspend=True)
    assert (changed.spec.backoff_limit, changed.spec.suspend, changed.metadata.generation) == (3, True, 2)


def test_gpu_requests_must_equal_their_limits(core: client.CoreV1Api) -> None:
    body = pod()
    body["spec"]["containers"][0]["resources"] = {
        "limits": {"nvidia.com/gpu": "2"},
        "requests": {"nvidia.com/gpu": "1"},
    }
    _refused(lambda: core.create_namespaced_pod("default", body), 422, "must be equal to nvidia.com/gpu limit")
    del body["spec"]["containers"][0]["resources"]["requests"]
    made = core.create_namespaced_pod("default", body)
    assert made.spec.containers[0].resources.requests == {"nvidia.com/gpu": "2"}


def test_a_headless_service_needs_no_ports(core: client.CoreV1Api) -> None:
    spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"a": "b"}}
    core.create_namespaced_service("default", {"metadata": {"name": "gang"}, "spec": spec})
    _refused(
        lambda: core.create_namespaced_service("default", {"metadata": {"name": "x"}, "spec": {}}), 422, "spec.ports"
    )


# Deletion and owners


def test_deleting_a_job_without_a_policy_leaves_its_pods_running(
    server: ApiServer, batch: client.BatchV1Api, core: client.CoreV1Api
) -> None:
    for policy, left in ((None, ["worker"]), ("Background", [])):
        uid = server.create(job())["metadata"]["uid"]
        server.create(pod(owner=uid))
        batch.delete_namespaced_job("gang", "default", **({"propagation_policy": policy} if policy else {}))
        marker = server.create(config_map(f"marker-{policy}".lower(), owner="11111111-0000-0000-0000-000000000000"))
        _until(lambda m=marker: not server.object("configmaps", m["metadata"]["name"]), "the collector sleeps")
        assert [item["metadata"]["name"] for item in server.objects("pods")] == left
        if left:
            assert not core.read_namespaced_pod("worker", "default").metadata.owner_references
            server.delete("pods", "worker")


def test_children_follow_their_owner_and_a_config_map_can_own(server: ApiServer, core: client.CoreV1Api) -> None:
    uid = server.create(config_map("owner"))["metadata"]["uid"]
    child = server.create(job(owner=uid))["metadata"]["uid"]
    server.create(config_map("grandchild", owner=child))
    core.delete_namespaced_config_map("owner", "default")
    _until(lambda: not server.objects("jobs") and not server.objects("configmaps"), "children stay")


def test_a_child_of_an_owner_that_never_was_is_collected_at_once(server: ApiServer) -> None:
    server.create(config_map(owner="11111111-0000-0000-0000-000000000000"))
    _until(lambda: not server.objects("configmaps"), "the orphan stays")


def test_a_foreground_deletion_waits_for_the_children(server: ApiServer, batch: client.BatchV1Api) -> None:
    uid = server.create(job())["metadata"]["uid"]
    placed(server, pod(owner=uid))
    batch.delete_namespaced_job("gang", "default", propagation_policy="Foreground")
    _until(lambda: "deletionTimestamp" in server.objects("pods")[0]["metadata"], "the pod is not asked to end")
    assert batch.read_namespaced_job("gang", "default").metadata.finalizers == ["foregroundDeletion"]
    server.delete("pods", "worker", grace_seconds=0)
    _until(lambda: not server.objects("jobs"), "the Job stays")


def test_a_pod_on_a_node_ends_when_its_kubelet_says_so(server: ApiServer, core: client.CoreV1Api) -> None:
    server.create(pod("waiting"))
    core.delete_namespaced_pod("waiting", "default")
    assert server.object("pods", "waiting") is None
    placed(server, pod(terminationGracePeriodSeconds=7))
    core.delete_namespaced_pod("worker", "default")
    metadata = core.read_namespaced_pod("worker", "default").metadata
    assert metadata.deletion_timestamp
    assert metadata.deletion_grace_period_seconds == 7
    core.delete_namespaced_pod("worker", "default", grace_period_seconds=0)
    assert server.object("pods", "worker") is None


def test_a_finalizer_keeps_a_forced_pod_until_it_is_stripped(server: ApiServer, core: client.CoreV1Api) -> None:
    body = pod()
    body["metadata"]["finalizers"] = ["prism.dev/read"]
    placed(server, body)
    core.delete_namespaced_pod("worker", "default", grace_period_seconds=0)
    assert core.read_namespaced_pod("worker", "default").metadata.deletion_timestamp
    more = {"metadata": {"finalizers": ["prism.dev/read", "prism.dev/more"]}}
    _refused(lambda: core.patch_namespaced_pod("worker", "default", more), 422, "no new finalizers")
    core.patch_namespaced_pod("worker", "default", [{"op": "remove", "path": "/metadata/finalizers"}])
    assert server.object("pods", "worker") is None


def test_a_deletion_with_another_uid_conflicts(server: ApiServer, core: client.CoreV1Api) -> None:
    server.create(config_map())
    options = client.V1DeleteOptions(preconditions=client.V1Preconditions(uid="another"))
    _refused(lambda: core.delete_namespaced_config_map("settings", "default", body=options), 409, "Precondition failed")


def test_a_namespace_takes_its_contents_along_and_accepts_nothing_meanwhile(
    server: ApiServer, core: client.CoreV1Api
) -> None:
    core.create_namespace({"metadata": {"name": "team"}})
    core.create_namespaced_config_map("team", {"metadata": {"name": "held", "finalizers": ["prism.dev/hold"]}})
    core.delete_namespace("team")
    assert core.read_namespace("team").status.phase == "Terminating"

    def make() -> Any:
        return core.create_namespaced_config_map("team", {"metadata": {"name": "late"}})

    _refused(make, 403, "because it is being terminated")
    _until(lambda: "deletionTimestamp" in server.object("configmaps", "held", "team")["metadata"], "contents stay")
    core.patch_namespaced_config_map("held", "team", [{"op": "remove", "path": "/metadata/finalizers"}])
    _until(lambda: server.object("namespaces", "team") is None, "the namespace stays")


def test_a_collection_is_deleted_by_its_labels(server: ApiServer, core: client.CoreV1Api) -> None:
    for name in ("a", "b"):
        server.create({**config_map(name), "metadata": {"name": name, "labels": {"which": name}}})
    core.delete_collection_namespaced_config_map("default", label_selector="which=a")
    assert [item["metadata"]["name"] for item in server.objects("configmaps", "default")] == ["b"]


def test_an_eviction_marks_the_pod_and_lets_it_end(server: ApiServer, core: client.CoreV1Api) -> None:
    uid = placed(server, pod())["metadata"]["uid"]

    def eviction(**options: Any) -> Any:
        return {"metadata": {"name": "worker"}, "deleteOptions": options}

    wrong = eviction(preconditions={"uid": "another"})
    _refused(lambda: core.create_namespaced_pod_eviction("worker", "default", wrong), 409)
    core.create_namespaced_pod_eviction("worker", "default", eviction(preconditions={"uid": uid}))
    read = core.read_namespaced_pod("worker", "default")
    assert read.metadata.deletion_timestamp
    assert [c.reason for c in read.status.conditions if c.type == "DisruptionTarget"] == ["EvictionByEvictionAPI"]
    _refused(lambda: core.create_namespaced_pod_eviction("none", "default", eviction()), 404)


# Admission


def restricted_pod() -> dict[str, Any]:
    context = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    whole = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    return {"securityContext": whole, "containers": [{"name": "worker", "image": "x:1", "securityContext": context}]}


def test_a_restricted_namespace_refuses_pods_but_only_warns_of_jobs(
    core: client.CoreV1Api, batch: client.BatchV1Api
) -> None:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    core.patch_namespace("default", {"metadata": {"labels": labels}})
    _refused(lambda: core.create_namespaced_pod("default", pod()), 403, 'violates PodSecurity "restricted:latest"')
    _, code, headers = batch.create_namespaced_job_with_http_info("default", job())
    assert code == 201
    assert "would violate PodSecurity" in headers["Warning"]
    core.create_namespaced_pod("default", {"metadata": {"name": "good"}, "spec": restricted_pod()})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hostNetwork": True}, "host namespaces"),
        ({"hostIPC": True}, "host namespaces"),
        ({"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}, "hostPath"),
        ({"initContainers": [{"name": "setup", "image": "x:1"}]}, "allowPrivilegeEscalation"),
        ({"securityContext": {}}, "runAsNonRoot"),
        ({"securityContext": {"runAsNonRoot": True}}, "seccompProfile"),
        ({"securityContext": {"runAsNonRoot": True, "runAsUser": 0}}, "runAsUser=0"),
        ({"containers": [{"name": "w", "ports": [{"containerPort": 1, "hostPort": 1}]}]}, "hostPort"),
        ({"containers": [{"name": "w", "securityContext": {"privileged": True}}]}, "privileged"),
        ({"containers": [{"name": "w", "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}}}]}, "capabilities"),
    ],
)
def test_the_restricted_profile_refuses(change: dict[str, Any], text: str) -> None:
    assert podsecurity.violations(restricted_pod()) == []
    assert text in " ".join(podsecurity.violations({**restricted_pod(), **change}))


def test_a_quota_is_held(server: ApiServer, core: client.CoreV1Api, batch: client.BatchV1Api) -> None:
    hard = {"pods": "1", "count/jobs.batch": "1", "requests.nvidia.com/gpu": "4"}
    server.create({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "q"}, "spec": {"hard": hard}})
    large = pod()
    large["spec"]["containers"][0]["resources"] = {"limits": {"nvidia.com/gpu": "8"}}
    _refused(lambda: core.create_namespaced_pod("default", large), 403, "requested: requests.nvidia.com/gpu=8, used: ")
    core.create_namespaced_pod("default", pod("one"))
    text = "exceeded quota: q, requested: pods=1, used: pods=1, limited: pods=1"
    _refused(lambda: core.create_namespaced_pod("default", pod("two")), 403, text)
    assert core.read_namespaced_resource_quota("q", "default").status.used["pods"] == "1"
    batch.create_namespaced_job("default", job())
    _refused(lambda: batch.create_namespaced_job("default", job("other")), 403, "count/jobs.batch=1")


def test_a_pod_needs_its_service_account(core: client.CoreV1Api) -> None:
    _refused(lambda: core.create_namespaced_pod("default", pod(serviceAccountName="none")), 403, "serviceaccount")


# Rights


def _grant(server: ApiServer, *rules: dict[str, Any]) -> None:
    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": {"name": "r"},
        "rules": list(rules),
    }
    subject = {"kind": "ServiceAccount", "name": "driver", "namespace": "default"}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "r"}
    binding = {"apiVersion": role["apiVersion"], "kind": "RoleBinding", "metadata": {"name": "b"}}
    server.create(role)
    server.create({**binding, "subjects": [subject], "roleRef": reference})


def test_a_service_account_may_do_what_its_roles_say(server: ApiServer, tmp_path: Path) -> None:
    _grant(
        server,
        {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get", "list", "patch"]},
        {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["mine"], "verbs": ["*"]},
    )
    server.create(config_map("mine"))
    server.create(config_map("yours"))
    with _client(server, tmp_path, "sa:default:driver") as api:
        batch, core = client.BatchV1Api(api), client.CoreV1Api(api)
        assert batch.list_namespaced_job("default").items == []
        user = 'User "system:serviceaccount:default:driver"'
        text = f'jobs.batch is forbidden: {user} cannot create resource "jobs" in API group "batch" in the namespace "default"'
        _refused(lambda: batch.create_namespaced_job("default", job()), 403, text)
        _refused(lambda: applied(api, job()), 403, 'cannot create resource "jobs"')
        server.create(job())
        patch = {"status": {"active": 1}}
        _refused(lambda: batch.patch_namespaced_job_status("gang", "default", patch), 403, '"jobs/status"')
        core.read_namespaced_config_map("mine", "default")
        _refused(lambda: core.read_namespaced_config_map("yours", "default"), 403, '"yours" is forbidden')
        _refused(lambda: batch.list_job_for_all_namespaces(), 403, "at the cluster scope")

        def review(verb, plural) -> Any:
            return {
                "spec": {
                    "resourceAttributes": {"verb": verb, "group": "batch", "resource": plural, "namespace": "default"}
                }
            }

        ask = client.AuthorizationV1Api(api).create_self_subject_access_review
        wanted = {("patch", "jobs"): True, ("create", "jobs"): False, ("get", "unheard-of"): False}
        assert {pair: ask(review(*pair)).status.allowed for pair in wanted} == wanted


def test_a_token_of_nobody_is_unauthorized(server: ApiServer, tmp_path: Path) -> None:
    with _client(server, tmp_path, "stranger") as api:
        _refused(lambda: client.CoreV1Api(api).list_namespaced_pod("default"), 401)


# Logs


def test_a_log_is_followed_until_its_pod_has_ended(server: ApiServer, core: client.CoreV1Api, tmp_path: Path) -> None:
    body = placed(server, pod())

    def read(**options: Any) -> Any:
        return core.read_namespaced_pod_log("worker", "default", _preload_content=False, **options)

    _refused(read, 400, 'container "worker" in pod "worker" is waiting to start: ContainerCreating')
    server.update({**body, "status": {"phase": "Running"}}, subresource="status")
    log = tmp_path / "logs" / "default" / f"worker.{body['metadata']['uid']}" / "worker.log"
    log.parent.mkdir(parents=True)
    log.write_text("one\ntwo\n")
    assert read(tail_lines=1).data == b"two\n"
    assert read(limit_bytes=3).data == b"one"

    def go_on() -> None:
        with log.open("a") as file:
            file.write("three\n")
        current = server.object("pods", "worker")
        server.update({**current, "status": {"phase": "Succeeded"}}, subresource="status")

    timer = threading.Timer(0.3, go_on)
    timer.start()
    assert b"".join(read(follow=True).stream()) == b"one\ntwo\nthree\n"
    timer.join()


# Bad weather


def test_scripted_faults_befall_the_requests_they_name(server: ApiServer, core: client.CoreV1Api) -> None:
    server.faults.retry_after_seconds = None
    server.faults.script([({"verb": "create", "plural": "configmaps"}, code) for code in ("429", "500", "503")])
    for code in (429, 500, 503):
        core.list_namespaced_config_map("default")
        _refused(lambda: core.create_namespaced_config_map("default", config_map()), code)
    core.create_namespaced_config_map("default", config_map())
    assert server.faults.pending == 0


def test_the_client_itself_repeats_reads_that_are_told_to_come_back(server: ApiServer, core: client.CoreV1Api) -> None:
    server.faults.script([({"verb": "list"}, "429"), ({"verb": "list"}, "reset_before")])
    core.list_namespaced_config_map("default")
    assert server.requests["LIST", "configmaps"] == 3


def test_a_lost_answer_was_carried_out(server: ApiServer, core: client.CoreV1Api) -> None:
    server.faults.script([({"verb": "create"}, "reset_after"), ({"verb": "create"}, "reset_before")])
    with pytest.raises(urllib3.exceptions.ProtocolError):
        core.create_namespaced_config_map("default", config_map("done"))
    with pytest.raises(urllib3.exceptions.ProtocolError):
        core.create_namespaced_config_map("default", config_map("undone"))
    assert [item["metadata"]["name"] for item in server.objects("configmaps")] == ["done"]


def test_something_else_can_happen_just_before_a_request(server: ApiServer, core: client.CoreV1Api) -> None:
    server.create(config_map())
    server.faults.script([({"verb": "patch"}, lambda request: server.delete("configmaps", "settings"))])
    _refused(lambda: core.patch_namespaced_config_map("settings", "default", {"data": {"a": "1"}}), 404)


def test_the_same_seed_spoils_the_same_requests_and_only_those_meant(
    server: ApiServer, core: client.CoreV1Api, tmp_path: Path
) -> None:
    def spoiled(count: int) -> list[tuple[int, int]]:
        server.faults.rain({"500": 0.3, "409": 0.2}, seed=7, only="prism")
        out = []
        for place in range(count):
            try:
                core.create_namespaced_config_map("default", config_map(f"c{place}"), dry_run="All")
            except ApiException as err:
                out.append((place, err.status))
        return out

    assert spoiled(20) == []
    core.api_client.user_agent = "prism/1"
    first = spoiled(60)
    assert 0 < len(first) < 60
    assert {code for _, code in first} == {500}
    assert spoiled(60) == first


def _pass_through(server: ApiServer) -> None:
    with server.outage():
        pass


def test_an_outage_refuses_connections_and_forgets_nothing(server: ApiServer, core: client.CoreV1Api) -> None:
    server.create(config_map())
    brief = threading.Timer(0.3, lambda: _pass_through(server))
    brief.start()
    with pytest.raises(urllib3.exceptions.ProtocolError):
        list(watch.Watch().stream(core.list_namespaced_config_map, "default", timeout_seconds=30))
    brief.join()
    with server.outage(), pytest.raises(urllib3.exceptions.MaxRetryError):
        core.list_namespaced_config_map("default")
    assert len(core.list_namespaced_config_map("default").items) == 1


def test_requests_are_counted_so_that_idleness_can_be_shown(server: ApiServer, core: client.CoreV1Api) -> None:
    core.create_namespaced_config_map("default", config_map())
    assert server.requests.writes() == server.requests["POST", "configmaps"] == 1
    server.requests.reset()
    core.list_namespaced_config_map("default")
    assert server.requests.writes() == 0


# kubectl


class Kubectl:
    """kubectl against one server, its caches in a folder of its own."""

    def __init__(self, server: ApiServer, folder: Path) -> None:
        self.folder = folder
        self.command = ["kubectl", "--kubeconfig", str(server.kubeconfig(folder / "kubectl.yaml"))]
        self.environment = {**os.environ, "HOME": str(folder), "KUBECACHEDIR": str(folder / "cache")}

    def __call__(self, *words: str, given: Any = None, code: int = 0) -> str:
        text = json.dumps(given) if given is not None else None
        done = subprocess.run(
            [*self.command, *words],
            input=text,
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen([*self.command, *words], stdout=subprocess.PIPE, text=True, env=self.environment)


@pytest.fixture
def kubectl(server: ApiServer, tmp_path: Path) -> Kubectl:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not on the PATH")
    return Kubectl(server, tmp_path)


def test_kubectl_applies_gets_patches_waits_and_deletes(kubectl: Kubectl, server: ApiServer) -> None:
    assert "created" in kubectl("apply", "-f", "-", given=definition())
    kubectl("wait", "--for=condition=Established", f"crd/{PLURAL}.{GROUP}", "--timeout=10s")
    assert "created" in kubectl("apply", "-f", "-", given=run())
    assert "unchanged" in kubectl("apply", "-f", "-", given=run())
    assert "configured" in kubectl("apply", "-f", "-", given=run(suspend=True))
    assert "serverside-applied" in kubectl("apply", "--server-side", "-f", "-", given=run(suspend=True))
    assert 'unknown field "spec.colour"' in kubectl("apply", "-f", "-", given=run(colour="red"), code=1)
    status = json.dumps({"status": {"phase": "Done", "conditions": [{"type": "Complete", "status": "True"}]}})
    kubectl("patch", "sel", "first", "--type=merge", "--subresource=status", "-p", status)
    header, row = kubectl("get", "sel").splitlines()
    assert header.split() == ["NAME", "PHASE", "AGE"]
    assert row.split()[:2] == ["first", "Done"]
    assert json.loads(kubectl("get", "sel", "first", "-o", "json"))["spec"]["suspend"]
    kubectl("wait", "--for=condition=Complete", "sel/first", "--timeout=10s")
    assert "deleted" in kubectl("delete", "sel", "first")
    assert server.objects(PLURAL) == []


def test_kubectl_wait_refuses_a_status_that_speaks_of_an_older_generation(
    kubectl: Kubectl, custom: Any, server: ApiServer
) -> None:
    server.create(run())
    complete = [{"type": "Complete", "status": "True"}]
    state = {**server.object(PLURAL, "first"), "status": {"observedGeneration": 1, "conditions": complete}}
    server.update(state, subresource="status")
    kubectl("wait", "--for=condition=Complete", "sel/first", "--timeout=10s")
    kubectl("patch", "sel", "first", "--type=merge", "-p", '{"spec": {"suspend": true}}')
    kubectl("wait", "--for=condition=Complete", "sel/first", "--timeout=1s", code=1)


def test_kubectl_applies_jobs_by_their_merge_keys(kubectl: Kubectl, server: ApiServer) -> None:
    kubectl("apply", "-f", "-", given=job())
    assert "configured" in kubectl("apply", "-f", "-", given=job(backoffLimit=2))
    assert "field is immutable" in kubectl("apply", "-f", "-", given=job(completions=3), code=1)
    assert server.object("jobs", "gang")["spec"]["backoffLimit"] == 2
    assert "gang" in kubectl("get", "jobs,pods,services")
    assert "Indexed" in kubectl("describe", "job", "gang")


def test_kubectl_follows_objects_and_logs(kubectl: Kubectl, server: ApiServer, tmp_path: Path) -> None:
    body = placed(server, pod())
    watcher = kubectl.start("get", "pods", "-w", "-o", "jsonpath={.status.phase}{'\\n'}")
    assert watcher.stdout.readline() == "Pending\n"
    running = server.update({**body, "status": {"phase": "Running"}}, subresource="status")
    assert watcher.stdout.readline() == "Running\n"
    log = tmp_path / "logs" / "default" / f"worker.{body['metadata']['uid']}" / "worker.log"
    log.parent.mkdir(parents=True)
    log.write_text("one\n")
    logs = kubectl.start("logs", "-f", "worker")
    assert logs.stdout.readline() == "one\n"
    server.update({**running, "status": {"phase": "Succeeded"}}, subresource="status")
    assert logs.wait(60) == 0
    watcher.terminate()
    watcher.wait(60)
    for process in (logs, watcher):
        process.stdout.close()


def test_client_side_apply_fails_past_the_size_of_an_annotation(kubectl: Kubectl) -> None:
    body = config_map(a="x" * 300_000)
    assert "262144" in kubectl("apply", "-f", "-", given=body, code=1)
    assert "serverside-applied" in kubectl("apply", "--server-side", "-f", "-", given=body)


def test_it_runs_as_a_process_of_its_own_with_faults_set_over_http(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.cluster.apiserver", "--kubeconfig", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().strip()
        http = urllib3.PoolManager()
        with config.new_client_from_config(str(tmp_path / "config.yaml")) as api:
            core = client.CoreV1Api(api)
            core.create_namespaced_config_map("default", config_map())
            wanted = {"script": [[{"verb": "delete"}, "500"]]}
            http.request("POST", f"{url}/__faults", json=wanted)
            _refused(lambda: core.delete_namespaced_config_map("settings", "default"), 500)
        answer = http.request("GET", f"{url}/__faults").json()
        assert answer["counts"] == {"500": 1}
        assert ["POST", "configmaps", 1] in answer["requests"]
        http.clear()
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()
