"""podOverlay: merged as `kubectl patch` merges the same patch, or refused when the document is parsed."""

from __future__ import annotations

import copy
import importlib.resources
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from launcher.render.attempt import Attempt
from launcher.render.job import job
from launcher.resource.document import parse_for_cluster
from launcher.resource.overlay import MERGE_KEYS, MERGED_STRINGS, RETAIN_KEYS, merge
from launcher.resource.overlay_refusals import refusals
from prism_job.errors import SpecError
from prism_job.spec.document import SelectionRun
from tests.resource.test_crd import changed

Object = dict[str, Any]


def run_of(**cluster: Any) -> SelectionRun:
    return parse_for_cluster(json.dumps(changed("spec.cluster", {"image": "registry/prism:1", **cluster})), "test")


def template_of(**cluster: Any) -> Object:
    return dict(job(Attempt(run_of(**cluster), "extract", namespace="team"))["spec"]["template"])


PLAIN = template_of(weightsClaim="weights")
RICH = template_of(
    weightsClaim="weights",
    podOverlay={
        "metadata": {"finalizers": ["team/a", "team/b", "team/c"]},
        "spec": {
            "nodeSelector": {"pool": "h100"},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
            "affinity": {"nodeAffinity": {"required": {"nodeSelectorTerms": []}}},
            "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["one"]}, {"ip": "10.0.0.2", "hostnames": ["two"]}],
            "imagePullSecrets": [{"name": "first"}, {"name": "second"}],
            "topologySpreadConstraints": [{"topologyKey": "zone", "maxSkew": 1, "whenUnsatisfiable": "ScheduleAnyway"}],
            "resourceClaims": [{"name": "gpus", "resourceClaimName": "shared"}],
            "initContainers": [
                {"name": "one", "image": "registry/one:1", "env": [{"name": "A", "value": "1"}]},
                {"name": "two", "image": "registry/two:1"},
            ],
            "containers": [
                {"name": "worker", "ports": [{"containerPort": 80, "name": "http"}, {"containerPort": 90}]},
                {"name": "proxy", "image": "registry/proxy:1", "args": ["-v", "-q"]},
            ],
        },
    },
)
"""A template with an item in most of the lists that are merged."""


# As kubectl patch


def worker(**fields: Any) -> Object:
    return {"spec": {"containers": [{"name": "worker", **fields}]}}


def volumes(*items: Object, **more: Any) -> Object:
    return {"spec": {"volumes": list(items), **more}}


CLAIM = {"claimName": "fast"}
ORDER = "$setElementOrder/volumes"

SAME: dict[str, Object] = {
    "nothing": {},
    "empty maps and lists": {"metadata": {}, "spec": {"containers": [], "volumes": []}},
    "a scalar": {"spec": {"terminationGracePeriodSeconds": 90}},
    "null removes a scalar": {"spec": {"enableServiceLinks": None}},
    "null removes a list": {"spec": {"imagePullSecrets": None}},
    "null removes a map": {"spec": {"securityContext": None}},
    "null removes the metadata": {"metadata": None},
    "nulls in a map that is new": {"spec": {"dnsConfig": {"nameservers": None, "searches": ["a"]}}},
    "nulls in an item that is new": volumes({"name": "new", "csi": None, "emptyDir": {"medium": None}}),
    "a deep path": worker(securityContext={"capabilities": {"add": ["SYS_PTRACE"]}}),
    "a map of another type": {"spec": {"nodeSelector": {"pool": {"not": "text"}}}},
    "labels and annotations": {"metadata": {"labels": {"team": "maths"}, "annotations": {"a/b": "c"}}},
    "a label removed": {"metadata": {"labels": {"prism.dev/run": None}}},
    "affinity": {"spec": {"affinity": {"nodeAffinity": None, "podAffinity": {"preferred": [{"weight": 1}]}}}},
    "tolerations are replaced": {"spec": {"tolerations": [{"key": "a"}, {"key": "a", "effect": "NoExecute"}]}},
    "command and args": worker(command=["sleep"], args=["1"]),
    "resources": worker(resources={"limits": {"memory": "9Gi"}, "requests": {"cpu": None}}),
    "environment": worker(env=[{"name": "HOME", "value": "/tmp"}, {"name": "MORE", "value": "1"}]),
    "a Secret in place of a value": worker(env=[{"name": "HOME", "value": None, "valueFrom": {"secretKeyRef": {"name": "a"}}}]),
    "a variable with two sources": worker(env=[{"name": "HOME", "valueFrom": {"fieldRef": {"fieldPath": "a"}}}]),
    "one volume mounted twice": worker(volumeMounts=[{"mountPath": "/corpus", "name": "models", "subPath": "corpus"}]),
    "another volume at a place": worker(volumeMounts=[{"mountPath": "/tmp", "name": "cache", "subPath": "tmp"}]),
    "one port of two protocols": {
        "spec": {"containers": [{"name": "dns", "ports": [{"containerPort": 53, "protocol": it} for it in ("TCP", "UDP")]}]}
    },
    "a sidecar": {"spec": {"containers": [{"name": "sidecar", "image": "registry/sidecar:1"}]}},
    "a sidecar behind the worker": {"spec": {"containers": [{"name": "worker"}, {"name": "sidecar", "image": "a"}]}},
    "init containers": {
        "spec": {"initContainers": [{"name": "zero", "image": "a"}, {"name": "one", "env": [{"name": "B", "value": "2"}]}]}
    },
    "init containers in another order": {"spec": {"initContainers": [{"name": "two"}, {"name": "one"}]}},
    "ephemeral containers": {"spec": {"ephemeralContainers": [{"name": "shell", "targetContainerName": "worker"}]}},
    "a volume that is new": volumes({"name": "corpus", "persistentVolumeClaim": CLAIM}),
    "a volume's source in more detail": volumes({"name": "cache", "emptyDir": {"medium": "Memory"}}),
    "a volume's source replaced by hand": volumes({"name": "cache", "emptyDir": None, "persistentVolumeClaim": CLAIM}),
    "a volume's source replaced by $retainKeys": volumes(
        {"name": "cache", "$retainKeys": ["name", "persistentVolumeClaim"], "persistentVolumeClaim": CLAIM}
    ),
    "a volume only named": volumes({"name": "tmp"}),
    "a volume given twice": volumes({"name": "new", "emptyDir": {}}, {"name": "new", "emptyDir": {"medium": "Memory"}}),
    "host aliases": {"spec": {"hostAliases": [{"ip": "10.0.0.2", "hostnames": ["b"]}, {"ip": "10.0.0.3"}]}},
    "an address given twice": {"spec": {"hostAliases": [{"ip": "10.0.0.9"}, {"ip": "10.0.0.9", "hostnames": ["b"]}]}},
    "finalizers": {"metadata": {"finalizers": ["team/d", "team/b", "team/d"]}},
    "owners": {"metadata": {"ownerReferences": [{"uid": "u-1", "kind": "Job"}]}},
    "a claim template's finalizers": volumes(
        {"name": "new", "ephemeral": {"volumeClaimTemplate": {"metadata": {"finalizers": ["a/b"]}}}}
    ),
    "delete an item": worker(env=[{"name": "HOME", "$patch": "delete"}]),
    "delete an item, its other fields ignored": volumes({"name": "tmp", "$patch": "delete", "emptyDir": {"medium": "a"}}),
    "delete a volume and make it anew": volumes(
        {"name": "cache", "persistentVolumeClaim": CLAIM}, {"name": "cache", "$patch": "delete"}
    ),
    "delete a container": {"spec": {"initContainers": [{"name": "one", "$patch": "delete"}]}},
    "delete what a map holds": {"spec": {"securityContext": {"$patch": "delete"}}},
    "delete a map that is not there": {"spec": {"dnsConfig": {"$patch": "delete", "searches": ["a"]}}},
    "replace a map": worker(resources={"$patch": "replace", "limits": {"cpu": "1"}}),
    "replace the labels": {"metadata": {"labels": {"$patch": "replace", "team": "maths"}}},
    "replace a list of items": volumes({"name": "new", "emptyDir": {}}, {"$patch": "replace"}),
    "replace a list of items, in an order": volumes(
        {"$patch": "replace"}, {"name": "b"}, {"name": "a"}, **{ORDER: [{"name": "b"}, {"name": "a"}]}
    ),
    "replace a list of items by nothing": worker(volumeMounts=[{"$patch": "replace"}]),
    "replace the whole template": {"$patch": "replace", "spec": {"containers": [{"name": "worker", "image": "a"}]}},
    "retain keys of a map": worker(resources={"$retainKeys": ["requests"], "requests": {"cpu": "9"}}),
    "retain keys that are not given": worker(resources={"$retainKeys": ["limits", "claims"]}),
    "order of items": volumes(**{ORDER: [{"name": "tmp"}, {"name": "document"}]}),
    "order with an item that is new": volumes(
        {"name": "new", "emptyDir": {}}, **{ORDER: [{"name": "tmp"}, {"name": "new"}, {"name": "shm"}]}
    ),
    "order within a container": worker(
        env=[{"name": "A", "value": "$(HOME)"}], **{"$setElementOrder/env": [{"name": "HOME"}, {"name": "A"}]}
    ),
    "order of strings with one that is new": {
        "metadata": {"finalizers": ["team/d"], "$setElementOrder/finalizers": ["team/c", "team/d", "team/a"]}
    },
    "order of a list that is replaced": worker(**{"$setElementOrder/command": ["prism_job", "python"]}),
    "remove strings": {"metadata": {"$deleteFromPrimitiveList/finalizers": ["team/b", "team/none"]}},
    "remove strings from a list that is replaced": worker(**{"$deleteFromPrimitiveList/command": ["-m"]}),
    "what apply sends": {
        "spec": {
            "$setElementOrder/containers": [{"name": "worker"}, {"name": "proxy"}],
            ORDER: [{"name": it} for it in ("document", "cache", "tmp", "shm", "models")],
            "containers": [{"name": "worker", "$setElementOrder/env": [{"name": "HOME"}, {"name": "TMPDIR"}], "env": []}],
            "volumes": [{"name": "tmp", "$retainKeys": ["name", "hostPath"], "emptyDir": None, "hostPath": {"path": "/a"}}],
        }
    },
}  # fmt: skip
"""Name -> an overlay that gives what `kubectl patch` gives."""


KUBECTL = ["kubectl", "patch", "--local", "--type=strategic", "-o", "json", "-f", "-", "-p"]


def patched(templates: list[Object], overlays: Iterable[Object], folder: Path) -> list[list[Object] | None]:
    """For each overlay what `kubectl patch` makes of each template, or None where it refuses. Several processes run at a time.

    A null is an absent field to a server.
    """
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not on the PATH")
    names = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "a"}}
    items = {"apiVersion": "v1", "kind": "List", "items": [{**names, "template": template} for template in templates]}
    options: dict[str, Any] = {"input": json.dumps(items), "capture_output": True, "text": True, "timeout": 60}
    options["env"] = {**os.environ, "HOME": str(folder), "KUBECACHEDIR": str(folder), "GOGC": "off"}

    def patch(overlay: Object) -> list[Object] | None:
        done = subprocess.run([*KUBECTL, json.dumps({"template": overlay})], check=False, **options)
        printed = json.loads("[" + done.stdout.replace("}\n{", "},{") + "]")  # one object after the other
        return None if done.returncode else [without_nulls(found["template"]) for found in printed]

    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(patch, overlays))


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def test_an_overlay_is_merged_as_kubectl_patch_merges_it(tmp_path: Path) -> None:
    answers = patched([PLAIN, RICH], SAME.values(), tmp_path)
    for (name, overlay), answer in zip(SAME.items(), answers, strict=True):
        assert [merge(PLAIN, overlay), merge(RICH, overlay)] == answer, name


# Refused


REFUSED_BY_BOTH: dict[str, tuple[Object, str, str]] = {
    "an item without its merge key": (volumes({"emptyDir": {}}), "spec.volumes[0]", "is missing name"),
    "a deeper item without its merge key": (
        worker(ports=[{"containerPort": 1}, {"name": "http"}]), "spec.containers[0].ports[1]", "is missing containerPort",
    ),
    "a deletion without the merge key": (volumes({"$patch": "delete"}), "spec.volumes[0]", "is missing name"),
    "an item that is no map": (volumes({"name": "a"}, "b"), "spec.volumes[1]", "must be a map"),  # type: ignore[arg-type]
    "an item that is null": ({"spec": {"containers": [None]}}, "spec.containers[0]", "must be a map"),
    "a merge key that is a map": (volumes({"name": {"a": "b"}}), "spec.volumes[0]", "is missing name"),
    "a finalizer that is no string": ({"metadata": {"finalizers": [3]}}, "metadata.finalizers[0]", "must be a string"),
    "$patch of another word": ({"spec": {"$patch": "remove"}}, "spec.$patch", "must be delete or replace"),
    "$patch: merge in an item": (volumes({"name": "tmp", "$patch": "merge"}), "spec.volumes[0].$patch", "must be delete"),
    "$retainKeys that is no list": (worker(**{"$retainKeys": "image"}), "spec.containers[0].$retainKeys", "a list of names"),
    "$retainKeys without a field that is given": (
        volumes({"name": "tmp", "$retainKeys": ["hostPath"], "hostPath": {"path": "/a"}}),
        "spec.volumes[0].$retainKeys", "does not name name",
    ),
    "an order that is no list": (volumes(**{ORDER: {"name": "tmp"}}), f"spec.{ORDER}", "must list the merge keys"),
    "an order without the merge key": (volumes(**{ORDER: [{"emptyDir": {}}]}), f"spec.{ORDER}", "must list the merge keys"),
    "an order that leaves out an item": (
        volumes({"name": "new"}, **{ORDER: [{"name": "tmp"}]}), f"spec.{ORDER}", "does not name all items",
    ),
    "an order other than the list's": (
        volumes({"name": "a"}, {"name": "b"}, **{ORDER: [{"name": "b"}, {"name": "a"}]}), f"spec.{ORDER}", "in their order",
    ),
    "an order of a list without a merge key": (
        {"spec": {"$setElementOrder/tolerations": [{"key": "gpu"}]}}, "spec.$setElementOrder/tolerations",
        "must list the merge keys",
    ),
    "an order of no list": ({"spec": {"$setElementOrder": ["a"]}}, "spec.$setElementOrder", "is not a known directive"),
    "strings removed from a list of items": (
        {"spec": {"$deleteFromPrimitiveList/volumes": ["tmp"]}}, "spec.$deleteFromPrimitiveList/volumes",
        "is not a list of strings",
    ),
    "items removed from a list without a merge key": (
        {"spec": {"$deleteFromPrimitiveList/tolerations": [{"key": "gpu"}]}}, "spec.$deleteFromPrimitiveList/tolerations",
        "must be a list of strings",
    ),
}  # fmt: skip
"""Name -> overlay, where it is wrong, what our refusal contains."""


REFUSED_HERE: dict[str, tuple[Object, str, str, str]] = {
    "an unknown directive": (
        {"spec": {"$replace": True}}, "spec.$replace", "is not a known directive",
        "it stays in the pod as a field, which a server drops",
    ),
    "$patch: replace beside fields of an item": (
        volumes({"name": "cache", "$patch": "replace", "emptyDir": {}}), "spec.volumes[0]", "drops the whole list",
        "all volumes are removed, this one too",
    ),
    "a directive in a list that is replaced": (
        {"spec": {"tolerations": [{"$patch": "delete", "key": "gpu"}]}}, "spec.tolerations[0].$patch", "cannot contain",
        "only the toleration to be deleted stays",
    ),
    "a directive deep in a list that is replaced": (
        {"spec": {"affinity": {"podAffinity": {"preferred": [{"weight": 1, "a": {"$retainKeys": []}}]}}}},
        "spec.affinity.podAffinity.preferred[0].a.$retainKeys", "cannot contain a directive",
        "it stays in the pod as a field",
    ),
    "a merge key that is null": (
        volumes({"name": None, "emptyDir": {}}), "spec.volumes[0]", "is missing name",
        "a volume without a name, which a server refuses",
    ),
    "an item without its merge key, onto nothing": (
        {"spec": {"schedulingGates": [{}]}}, "spec.schedulingGates[0]", "is missing name",
        "a gate without a name, which a server refuses",
    ),
    "a list that is no list": (
        {"spec": {"containers": "none"}}, "spec.containers", "must be a list", "a server refuses the pod",
    ),
    "a map that is no map": ({"spec": "none"}, "spec", "must be a map", "a server refuses the pod"),
    "a field beside metadata and spec": (
        {"nodeSelector": {"pool": "a"}}, "nodeSelector", "has only metadata and spec",
        "the selector belongs under spec; a server drops it",
    ),
    "an order that names nothing": (
        volumes({"name": "new"}, **{ORDER: []}), "spec.$setElementOrder/volumes", "does not name all",
        "the place of an item that no list names is left to chance",
    ),
}  # fmt: skip
"""Name -> overlay, where it is wrong, what our refusal contains, and what kubectl makes of it."""


@pytest.mark.parametrize("name", [*REFUSED_BY_BOTH, *REFUSED_HERE])
def test_an_overlay_that_cannot_be_merged_or_has_no_useful_effect_is_refused(name: str) -> None:
    overlay, where, message, *_ = {**REFUSED_BY_BOTH, **REFUSED_HERE}[name]
    refusal = next(refusals(overlay))
    assert refusal.where == f"spec.cluster.podOverlay.{where}"
    assert message in refusal.what
    assert refusal.fix
    with pytest.raises(SpecError) as caught:
        run_of(podOverlay=overlay)
    assert f"spec.cluster.podOverlay.{where}: " in caught.value.what
    assert message in caught.value.what


def test_kubectl_refuses_too_what_cannot_be_merged(tmp_path: Path) -> None:
    tables = {**REFUSED_BY_BOTH, **REFUSED_HERE}
    answers = patched([RICH], [overlay for overlay, *_ in tables.values()], tmp_path)
    assert {name for name, answer in zip(tables, answers, strict=True) if answer is None} == REFUSED_BY_BOTH.keys()


def test_all_that_is_wrong_with_an_overlay_is_reported_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        run_of(podOverlay={"spec": {"volumes": [{}, {"name": "a"}, {"$patch": "delete"}], "$x": 1, "containers": {}}})
    lines = caught.value.what.splitlines()
    assert lines[0].startswith("4 thing(s)")
    fields = [line.split(": ")[0].strip().removeprefix("spec.cluster.podOverlay.") for line in lines[1:]]
    assert fields == ["spec.volumes[0]", "spec.volumes[2]", "spec.$x", "spec.containers"]


@pytest.mark.parametrize(
    "item",
    [
        {"name": "HF_TOKEN", "value": "c2VjcmV0"},
        {"name": "HF_TOKEN", "value": "c2VjcmV0", "$patch": "delete"},
        {"name": "HF_TOKEN", "value": "c2VjcmV0", "$retainKeys": ["name", "value"]},
    ],
)
@pytest.mark.parametrize("field", ["env", "$setElementOrder/env"])
def test_no_directive_hides_a_literal_secret(item: Object, field: str) -> None:
    with pytest.raises(SpecError, match="is a secret") as caught:
        run_of(podOverlay=worker(**{field: [item, {"$patch": "replace"}]}))
    assert "c2VjcmV0" not in str(caught.value)


# Other than kubectl patch


DIFFERENT: dict[str, tuple[Object, Object, str]] = {
    "another source of a volume": (
        volumes({"name": "cache", "persistentVolumeClaim": CLAIM}),
        volumes({"name": "cache", "$retainKeys": ["name", "persistentVolumeClaim"], "persistentVolumeClaim": CLAIM}),
        "kubectl patch leaves both sources, which a server refuses; kubectl apply sends $retainKeys by itself",
    ),
    "other sources of several volumes": (
        volumes({"name": "tmp", "hostPath": {"path": "/a"}}, {"name": "new", "emptyDir": {}}, {"name": "models", "nfs": {}}),
        volumes(
            {"name": "tmp", "$retainKeys": ["name", "hostPath"], "hostPath": {"path": "/a"}},
            {"name": "new", "emptyDir": {}},
            {"name": "models", "$retainKeys": ["name", "nfs"], "nfs": {}},
        ),
        "as above",
    ),
    "another source of a resource claim": (
        {"spec": {"resourceClaims": [{"name": "gpus", "resourceClaimTemplateName": "a"}]}},
        {"spec": {"resourceClaims": [{
            "name": "gpus", "$retainKeys": ["name", "resourceClaimTemplateName"], "resourceClaimTemplateName": "a",
        }]}},
        "as above; of the strategy retainKeys there are volumes and resource claims",
    ),
    "replace a map that is not there": (
        {"spec": {"dnsConfig": {"$patch": "replace", "searches": ["a"]}}},
        {"spec": {"dnsConfig": {"searches": ["a"]}}},
        "kubectl drops the map with the directive",
    ),
    "replace a map in an item that is new": (
        volumes({"name": "new", "emptyDir": {"$patch": "replace", "medium": "Memory"}}),
        volumes({"name": "new", "emptyDir": {"medium": "Memory"}}),
        "kubectl leaves the directive in the pod",
    ),
    "directives in an item that is new": (
        {"spec": {"containers": [{
            "name": "new",
            "env": [{"name": "A", "$patch": "delete"}, {"name": "B"}, {"name": "C"}],
            "$setElementOrder/env": [{"name": "B"}, {"name": "C"}],
            "resources": {"$patch": "delete"},
            "$deleteFromPrimitiveList/args": ["-v"],
        }]}},
        {"spec": {"containers": [{"name": "new", "env": [{"name": "B"}, {"name": "C"}]}]}},
        "kubectl leaves them in the pod: the variable to be removed is set, to nothing",
    ),
}  # fmt: skip
"""Name -> overlay, the patch for which kubectl gives our result, why kubectl's answer to the overlay itself is of no use."""


def test_where_kubectl_patch_breaks_the_pod_the_overlay_is_merged_like_its_explicit_form(tmp_path: Path) -> None:
    answers = patched([RICH], [patch for *patches, _ in DIFFERENT.values() for patch in patches], tmp_path)
    for (name, (overlay, _, _)), of_overlay, of_explicit in zip(
        DIFFERENT.items(), answers[::2], answers[1::2], strict=True
    ):
        assert [merge(RICH, overlay)] == of_explicit != of_overlay, name


def test_a_list_that_loses_and_gains_items_in_an_order_is_merged_like_two_patches(tmp_path: Path) -> None:
    """kubectl alone puts the new item elsewhere: Go's list after a deletion shares memory with the list before it."""
    delete, new = {"name": "cache", "$patch": "delete"}, {"name": "new", "emptyDir": {}}
    order = {ORDER: [{"name": "tmp"}, {"name": "new"}]}
    ours = merge(PLAIN, volumes(new, delete, **order))
    first, at_once = patched([PLAIN], [volumes(delete), volumes(new, delete, **order)], tmp_path)
    assert first is not None
    assert [[ours]] == patched(first, [volumes(new, **order)], tmp_path)
    assert [ours] != at_once


# The table of merge keys


def schema_of(version: str) -> Object:
    folder = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema"
    return dict(json.loads((folder / f"v{version}-local" / "_definitions.json").read_text())["$defs"])


def lists_of(definitions: Object, name: str, path: str = "") -> Iterator[tuple[str, str | None, str | None]]:
    """(path, patch strategy, merge key) of every list within a definition."""
    for field, schema in definitions[name].get("properties", {}).items():
        inner = f"{path}.{field}".lstrip(".")
        kind = schema.get("type")
        if "array" in (kind if isinstance(kind, list) else [kind]):
            yield inner, schema.get("x-kubernetes-patch-strategy"), schema.get("x-kubernetes-patch-merge-key")
        reference = schema.get("$ref") or schema.get("items", {}).get("$ref")
        if reference:
            yield from lists_of(definitions, reference.rsplit("/", 1)[1], inner)


def test_every_list_is_merged_as_the_schema_of_each_kubernetes_version_demands() -> None:
    everywhere: set[str] = set()
    for version in sorted(set(kubernetes_validate.utils.all_versions())):
        lists = {
            path: tuple(rest) for path, *rest in lists_of(schema_of(version), "io.k8s.api.core.v1.PodTemplateSpec")
        }
        strategies = {path: set((strategy or "").split(",")) for path, (strategy, _) in lists.items()}
        merged = {path for path, found in strategies.items() if "merge" in found}
        everywhere |= merged
        assert {path: lists[path][1] for path in merged} == {
            path: MERGE_KEYS.get(path) for path in (*MERGE_KEYS, *MERGED_STRINGS) if path in lists
        }
        assert {path for path, found in strategies.items() if "retainKeys" in found} == set(RETAIN_KEYS) & lists.keys()
    assert everywhere == {*MERGE_KEYS, *MERGED_STRINGS}


# Laws


KEYS = {"volumes": "name", "containers": "name", "imagePullSecrets": "name", "hostAliases": "ip"}


def items_of(key: str) -> st.SearchStrategy[list[Object]]:
    identity = st.sampled_from(["worker", "cache", "tmp", "first", "10.0.0.1", "new", "newer"])
    fields = {
        "emptyDir": st.sampled_from([None, {}, {"medium": "Memory"}]),
        "persistentVolumeClaim": st.sampled_from([None, {"claimName": "a"}, {"$patch": "replace", "claimName": "b"}]),
        "args": st.lists(st.sampled_from("ab"), max_size=2),
        "$patch": st.just("delete"),
    }
    items = st.fixed_dictionaries({key: identity}, optional=fields)
    lists = st.lists(items, max_size=4, unique_by=lambda item: item[key])
    return lists | lists.map(lambda items: [*items, {"$patch": "replace"}])


def with_orders(spec: Object) -> Object:
    """Each list also in the order in which it stands."""
    orders = {}
    for name, key in KEYS.items():
        if spec.get(name):
            orders[f"$setElementOrder/{name}"] = [{key: item[key]} for item in spec[name] if key in item]
    return {**spec, **orders}


SPECS = st.fixed_dictionaries(
    {},
    optional={
        **{name: items_of(key) for name, key in KEYS.items()},
        "tolerations": st.sampled_from([None, [], [{"key": "a"}]]),
        "nodeSelector": st.sampled_from(
            [None, {"pool": "a"}, {"$patch": "replace", "pool": "b"}, {"$patch": "delete"}]
        ),
        "affinity": st.sampled_from([None, {"podAffinity": None}, {"$retainKeys": ["podAffinity"], "podAffinity": {}}]),
    },
)
METADATA = st.fixed_dictionaries(
    {},
    optional={
        "labels": st.sampled_from([None, {"a": "b"}, {"$patch": "replace", "c": "d"}]),
        "finalizers": st.lists(st.sampled_from(["team/a", "team/c", "team/x", "team/y"]), max_size=3, unique=True),
        "$deleteFromPrimitiveList/finalizers": st.just(["team/b"]),
    },
)
OVERLAYS = st.fixed_dictionaries({}, optional={"spec": SPECS | SPECS.map(with_orders), "metadata": METADATA})


@given(OVERLAYS)
@settings(deadline=None)
def test_merging_an_overlay_twice_changes_nothing(overlay: Object) -> None:
    for template in (PLAIN, RICH):
        once = merge(template, overlay)
        assert merge(once, overlay) == once
        assert merge(once, copy.deepcopy(once)) == once
        assert merge(once, {}) == once


@given(OVERLAYS)
@settings(deadline=None)
def test_neither_a_directive_nor_a_null_stays_in_a_pod(overlay: Object) -> None:
    merged = merge(RICH, overlay)
    assert merged == without_nulls(merged)
    assert '"$' not in json.dumps(merged)


def test_the_overlay_is_not_shared_and_the_template_is_not_changed() -> None:
    overlay = {
        "spec": {"tolerations": [{"key": "a"}], "nodeSelector": {"a": "b"}, "volumes": [{"name": "new", "a": {}}]}
    }
    template, given = copy.deepcopy(RICH), copy.deepcopy(overlay)
    merged = merge(template, overlay)
    merged["spec"]["tolerations"].append({"key": "b"})
    merged["spec"]["nodeSelector"]["a"] = "c"
    merged["spec"]["volumes"][0]["a"]["b"] = "c"
    assert overlay == given
    assert template == RICH


WORDS = ["name", "spec", "containers", "volumes", "env", "args", "$patch", "$retainKeys", "$x"]
WORDS += ["$setElementOrder/env", "$setElementOrder/args", "$deleteFromPrimitiveList/args"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from(["spec", "metadata"]), JSON, max_size=2))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example({"spec": {"containers": [{"name": {"no": "name"}}]}})
@example({"spec": {"containers": [{"name": "worker", "env": [{"name": None}, 3]}], "volumes": "none"}})
@example({"spec": {"containers": [{"name": "worker", "args": ["a", {}], "$setElementOrder/args": ["a"], 80: {80: 1}}]}})
def test_any_overlay_is_merged_or_refused(overlay: Object) -> None:
    wrong = [refusal.where for refusal in refusals(overlay)]
    assert all(where.startswith("spec.cluster.podOverlay.") for where in wrong)
    if not wrong:
        json.dumps(merge(RICH, overlay))


WITHOUT_WORKER: list[Object] = [
    {"$patch": "delete"},
    {"spec": None},
    {"spec": {"$patch": "delete"}},
    {"spec": {"$patch": "replace", "hostNetwork": False}},
    {"spec": {"containers": None}},
    {"spec": {"containers": [{"$patch": "replace"}]}},
    {"spec": {"containers": [{"name": "worker", "$patch": "delete"}]}},
]


@pytest.mark.parametrize("overlay", WITHOUT_WORKER, ids=str)
def test_an_overlay_that_removes_the_worker_is_refused_when_the_document_is_read(overlay: Object) -> None:
    with pytest.raises(SpecError, match="podOverlay"):
        run_of(podOverlay=overlay)
