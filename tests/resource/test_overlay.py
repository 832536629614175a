"""Laws of podOverlay: it is merged as `kubectl patch` merges the same patch, or refused when the document is parsed."""

from __future__ import annotations

import copy
import importlib.resources
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from launcher.render.attempt import Attempt
from launcher.render.job import job
from launcher.resource.document import parse_for_cluster
from launcher.resource.overlay import MERGE_KEYS, MERGED_STRINGS, RETAIN_KEYS, merge, refusals
from prism_job.errors import SpecError
from prism_job.spec.document import SelectionRun

Object = dict[str, Any]


def run_of(**cluster: Any) -> SelectionRun:
    document = {
        "apiVersion": "prism.dev/v1alpha1",
        "kind": "SelectionRun",
        "metadata": {"name": "demo"},
        "spec": {
            "model": {"uri": "org/model"},
            "candidates": {"uris": ["s3://bucket/pool/"]},
            "targets": {"uris": ["s3://bucket/targets.jsonl"]},
            "store": "s3://bucket/store",
            "output": "s3://bucket/selections",
            "selection": {"keep": "highest", "budget": {"fraction": 0.1}},
            "cluster": {"image": "registry/prism:1", **cluster},
        },
    }
    return parse_for_cluster(json.dumps(document), "test")


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
"""A template with an item in most lists that are merged, so that there is something to meet."""


# As kubectl patch


def worker(**fields: Any) -> Object:
    return {"spec": {"containers": [{"name": "worker", **fields}]}}


def volumes(*items: Object, **more: Any) -> Object:
    return {"spec": {"volumes": list(items), **more}}


CLAIM = {"claimName": "fast"}

SAME: dict[str, Object] = {
    "nothing": {},
    "empty maps and lists": {"metadata": {}, "spec": {"containers": [], "volumes": []}},
    "a scalar": {"spec": {"terminationGracePeriodSeconds": 90}},
    "a scalar that is new": {"spec": {"runtimeClassName": "nvidia"}},
    "null removes a scalar": {"spec": {"enableServiceLinks": None}},
    "null removes what is not there": {"spec": {"hostname": None}},
    "null removes a list": {"spec": {"imagePullSecrets": None}},
    "null removes a map": {"spec": {"securityContext": None}},
    "null removes the metadata": {"metadata": None},
    "nulls in a map that is new": {"spec": {"dnsConfig": {"nameservers": None, "searches": ["a"]}}},
    "nulls in an item that is new": volumes({"name": "new", "csi": None, "emptyDir": {"medium": None}}),
    "a deep path": worker(securityContext={"capabilities": {"add": ["SYS_PTRACE"]}}),
    "a map of another type": {"spec": {"nodeSelector": {"pool": {"not": "text"}}}},
    "labels and annotations": {"metadata": {"labels": {"team": "maths"}, "annotations": {"a/b": "c"}}},
    "a label removed": {"metadata": {"labels": {"prism.dev/run": None}}},
    "node selector": {"spec": {"nodeSelector": {"disk": "ssd"}}},
    "affinity": {"spec": {"affinity": {"nodeAffinity": None, "podAffinity": {"preferred": [{"weight": 1}]}}}},
    "tolerations are replaced": {"spec": {"tolerations": [{"key": "a"}, {"key": "a", "effect": "NoExecute"}]}},
    "tolerations are emptied": {"spec": {"tolerations": []}},
    "args are replaced": worker(args=["other"]),
    "command and args": worker(command=["sleep"], args=["1"]),
    "resources": worker(resources={"limits": {"memory": "9Gi"}, "requests": {"cpu": None}}),
    "environment": worker(env=[{"name": "HOME", "value": "/tmp"}, {"name": "MORE", "value": "1"}]),
    "a variable's value gives way to a Secret": worker(
        env=[{"name": "HOME", "value": None, "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}]
    ),
    "a variable with both sources, refused by the server": worker(
        env=[{"name": "HOME", "valueFrom": {"fieldRef": {"fieldPath": "a"}}}]
    ),
    "environment from a ConfigMap": worker(envFrom=[{"configMapRef": {"name": "a"}}]),
    "one volume mounted twice": worker(volumeMounts=[{"mountPath": "/corpus", "name": "models", "subPath": "corpus"}]),
    "another volume at a place": worker(volumeMounts=[{"mountPath": "/tmp", "name": "cache", "subPath": "tmp"}]),
    "block devices": worker(volumeDevices=[{"devicePath": "/dev/a", "name": "models"}]),
    "ports": worker(ports=[{"containerPort": 80, "protocol": "UDP"}, {"containerPort": 81, "name": "http"}]),
    "one port of two protocols": {
        "spec": {"containers": [{"name": "dns", "ports": [{"containerPort": 53, "protocol": it} for it in ("TCP", "UDP")]}]}
    },
    "a sidecar": {"spec": {"containers": [{"name": "sidecar", "image": "registry/sidecar:1"}]}},
    "a sidecar behind the worker": {
        "spec": {"containers": [{"name": "worker"}, {"name": "sidecar", "image": "registry/sidecar:1"}]}
    },
    "init containers": {
        "spec": {"initContainers": [{"name": "zero", "image": "a"}, {"name": "one", "env": [{"name": "B", "value": "2"}]}]}
    },
    "init containers in another order": {"spec": {"initContainers": [{"name": "two"}, {"name": "one"}]}},
    "ephemeral containers": {"spec": {"ephemeralContainers": [{"name": "shell", "targetContainerName": "worker"}]}},
    "a volume that is new": volumes({"name": "corpus", "persistentVolumeClaim": CLAIM}),
    "a volume's source in more detail": volumes({"name": "cache", "emptyDir": {"medium": "Memory"}}),
    "a volume's source replaced by hand": volumes(
        {"name": "cache", "emptyDir": None, "persistentVolumeClaim": CLAIM}
    ),
    "a volume's source replaced by $retainKeys": volumes(
        {"name": "cache", "$retainKeys": ["name", "persistentVolumeClaim"], "persistentVolumeClaim": CLAIM}
    ),
    "a volume only named": volumes({"name": "tmp"}),
    "a volume given twice": volumes({"name": "new", "emptyDir": {}}, {"name": "new", "emptyDir": {"medium": "Memory"}}),
    "image pull secrets": {"spec": {"imagePullSecrets": [{"name": "third"}, {"name": "second"}]}},
    "host aliases": {"spec": {"hostAliases": [{"ip": "10.0.0.2", "hostnames": ["b"]}, {"ip": "10.0.0.3"}]}},
    "an address given twice": {"spec": {"hostAliases": [{"ip": "10.0.0.9"}, {"ip": "10.0.0.9", "hostnames": ["b"]}]}},
    "topology spread": {"spec": {"topologySpreadConstraints": [{"topologyKey": "zone", "maxSkew": 2}, {"topologyKey": "a"}]}},
    "scheduling gates": {"spec": {"schedulingGates": [{"name": "team/gate"}]}},
    "resource claims": {"spec": {"resourceClaims": [{"name": "more", "resourceClaimTemplateName": "a"}]}},
    "finalizers": {"metadata": {"finalizers": ["team/d", "team/b", "team/d"]}},
    "owners": {"metadata": {"ownerReferences": [{"uid": "u-1", "kind": "Job"}]}},
    "a claim template's finalizers": volumes(
        {"name": "new", "ephemeral": {"volumeClaimTemplate": {"metadata": {"finalizers": ["a/b"]}}}}
    ),
    "delete an item": worker(env=[{"name": "HOME", "$patch": "delete"}]),
    "delete an item, its other fields ignored": volumes({"name": "tmp", "$patch": "delete", "emptyDir": {"medium": "a"}}),
    "delete an item that is not there": volumes({"name": "none", "$patch": "delete"}),
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
        {"$patch": "replace"}, {"name": "b"}, {"name": "a"}, **{"$setElementOrder/volumes": [{"name": "b"}, {"name": "a"}]}
    ),
    "replace a list of items by nothing": worker(volumeMounts=[{"$patch": "replace"}]),
    "replace the whole template": {"$patch": "replace", "spec": {"containers": [{"name": "worker", "image": "a"}]}},
    "retain keys of a map": worker(resources={"$retainKeys": ["requests"], "requests": {"cpu": "9"}}),
    "retain keys that are not given": worker(resources={"$retainKeys": ["limits", "claims"]}),
    "order of items": volumes(**{"$setElementOrder/volumes": [{"name": "tmp"}, {"name": "document"}]}),
    "order with an item that is new": volumes(
        {"name": "new", "emptyDir": {}}, **{"$setElementOrder/volumes": [{"name": "tmp"}, {"name": "new"}, {"name": "shm"}]}
    ),
    "order within a container": worker(
        env=[{"name": "A", "value": "$(HOME)"}], **{"$setElementOrder/env": [{"name": "HOME"}, {"name": "A"}]}
    ),
    "order of strings": {"metadata": {"$setElementOrder/finalizers": ["team/c", "team/a"]}},
    "order of strings with one that is new": {
        "metadata": {"finalizers": ["team/d"], "$setElementOrder/finalizers": ["team/c", "team/d", "team/a"]}
    },
    "order of a list that is replaced": worker(**{"$setElementOrder/command": ["prism_job", "python"]}),
    "remove strings": {"metadata": {"$deleteFromPrimitiveList/finalizers": ["team/b", "team/none"]}},
    "remove strings from a list that is replaced": worker(**{"$deleteFromPrimitiveList/command": ["-m"]}),
    "what apply sends": {
        "spec": {
            "$setElementOrder/containers": [{"name": "worker"}, {"name": "proxy"}],
            "$setElementOrder/volumes": [{"name": it} for it in ("document", "cache", "tmp", "shm", "models")],
            "containers": [{"name": "worker", "$setElementOrder/env": [{"name": "HOME"}, {"name": "TMPDIR"}], "env": []}],
            "volumes": [{"name": "tmp", "$retainKeys": ["name", "hostPath"], "emptyDir": None, "hostPath": {"path": "/a"}}],
        }
    },
}  # fmt: skip
"""Name -> an overlay that gives what `kubectl patch` gives."""


def patched(templates: list[Object], overlay: Object, folder: Path) -> list[Object] | None:
    """What `kubectl patch --local` makes of each template; None where it refuses. A null is an absent field to a server."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not on the PATH")
    items = [
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": f"t{place}"}, "template": template}
        for place, template in enumerate(templates)
    ]
    done = subprocess.run(
        [
            "kubectl",
            "patch",
            "--local",
            "--type=strategic",
            "-o",
            "json",
            "-f",
            "-",
            "-p",
            json.dumps({"template": overlay}),
        ],
        input=json.dumps({"apiVersion": "v1", "kind": "List", "items": items}),
        env={**os.environ, "HOME": str(folder), "KUBECACHEDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return None if done.returncode else [without_nulls(found["template"]) for found in _objects(done.stdout)]


def _objects(text: str) -> Iterator[Object]:
    """kubectl prints one JSON object after the other."""
    decoder = json.JSONDecoder()
    while text := text.strip():
        found, end = decoder.raw_decode(text)
        yield found
        text = text[end:]


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", SAME)
def test_an_overlay_is_merged_as_kubectl_patch_merges_it(name: str, tmp_path: Path) -> None:
    assert [merge(PLAIN, SAME[name]), merge(RICH, SAME[name])] == patched([PLAIN, RICH], SAME[name], tmp_path)


# Refused


REFUSED_BY_BOTH: dict[str, tuple[Object, str, str]] = {
    "an item without its merge key": (volumes({"emptyDir": {}}), "spec.volumes[0]", "has no name"),
    "a deeper item without its merge key": (
        worker(ports=[{"containerPort": 1}, {"name": "http"}]),
        "spec.containers[0].ports[1]",
        "has no containerPort",
    ),
    "a deletion without the merge key": (volumes({"$patch": "delete"}), "spec.volumes[0]", "has no name"),
    "an item that is no map": (volumes({"name": "a"}, "b"), "spec.volumes[1]", "must be a map"),  # type: ignore[arg-type]
    "an item that is null": ({"spec": {"containers": [None]}}, "spec.containers[0]", "must be a map"),
    "a merge key that is a map": (volumes({"name": {"a": "b"}}), "spec.volumes[0]", "has no name"),
    "a finalizer that is no string": ({"metadata": {"finalizers": [3]}}, "metadata.finalizers[0]", "must be a string"),
    "$patch of another word": ({"spec": {"$patch": "remove"}}, "spec.$patch", "must be delete or replace"),
    "$patch: merge in an item": (volumes({"name": "tmp", "$patch": "merge"}), "spec.volumes[0].$patch", "must be delete"),
    "$retainKeys that is no list": (worker(**{"$retainKeys": "image"}), "spec.containers[0].$retainKeys", "a list of names"),
    "$retainKeys without a field that is given": (
        volumes({"name": "tmp", "$retainKeys": ["hostPath"], "hostPath": {"path": "/a"}}),
        "spec.volumes[0].$retainKeys",
        "does not name name",
    ),
    "an order that is no list": (
        volumes(**{"$setElementOrder/volumes": {"name": "tmp"}}),
        "spec.$setElementOrder/volumes",
        "must list what tells",
    ),
    "an order without the merge key": (
        volumes(**{"$setElementOrder/volumes": [{"emptyDir": {}}]}),
        "spec.$setElementOrder/volumes",
        "must list what tells",
    ),
    "an order that leaves out an item": (
        volumes({"name": "new"}, **{"$setElementOrder/volumes": [{"name": "tmp"}]}),
        "spec.$setElementOrder/volumes",
        "does not name all items",
    ),
    "an order other than the list's": (
        volumes({"name": "a"}, {"name": "b"}, **{"$setElementOrder/volumes": [{"name": "b"}, {"name": "a"}]}),
        "spec.$setElementOrder/volumes",
        "in their order",
    ),
    "an order of a list without a merge key": (
        {"spec": {"$setElementOrder/tolerations": [{"key": "gpu"}]}},
        "spec.$setElementOrder/tolerations",
        "must list what tells",
    ),
    "an order of no list": ({"spec": {"$setElementOrder": ["a"]}}, "spec.$setElementOrder", "is no directive"),
    "strings removed from a list of items": (
        {"spec": {"$deleteFromPrimitiveList/volumes": ["tmp"]}},
        "spec.$deleteFromPrimitiveList/volumes",
        "is no list of strings",
    ),
    "items removed from a list without a merge key": (
        {"spec": {"$deleteFromPrimitiveList/tolerations": [{"key": "gpu"}]}},
        "spec.$deleteFromPrimitiveList/tolerations",
        "must be a list of strings",
    ),
}  # fmt: skip
"""Name -> overlay, where it is wrong, what our refusal says."""


REFUSED_HERE: dict[str, tuple[Object, str, str, str]] = {
    "an unknown directive": (
        {"spec": {"$replace": True}}, "spec.$replace", "is no directive",
        "it stays in the pod as a field, which a server drops",
    ),
    "$patch: replace beside fields of an item": (
        volumes({"name": "cache", "$patch": "replace", "emptyDir": {}}), "spec.volumes[0]", "drops the whole list",
        "all volumes go, this one too",
    ),
    "a directive in a list that is replaced": (
        {"spec": {"tolerations": [{"$patch": "delete", "key": "gpu"}]}}, "spec.tolerations[0].$patch", "no directive",
        "the toleration that was to go is all that stays",
    ),
    "a directive deep in a list that is replaced": (
        {"spec": {"affinity": {"podAffinity": {"preferred": [{"weight": 1, "a": {"$retainKeys": []}}]}}}},
        "spec.affinity.podAffinity.preferred[0].a.$retainKeys", "no directive",
        "it stays in the pod as a field",
    ),
    "a merge key that is null": (
        volumes({"name": None, "emptyDir": {}}), "spec.volumes[0]", "has no name",
        "a volume without a name, which a server refuses",
    ),
    "an item without its merge key, onto nothing": (
        {"spec": {"schedulingGates": [{}]}}, "spec.schedulingGates[0]", "has no name",
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
        volumes({"name": "new"}, **{"$setElementOrder/volumes": []}), "spec.$setElementOrder/volumes", "does not name all",
        "the place of an item that no list names is left to chance",
    ),
}  # fmt: skip
"""Name -> overlay, where it is wrong, what our refusal says, and what kubectl makes of it."""


def is_refused(overlay: Object, where: str, says: str) -> None:
    """By the merge, and by the document, which tells every field that is wrong."""
    with pytest.raises(SpecError) as caught:
        merge(RICH, overlay)
    assert caught.value.where == f"spec.cluster.podOverlay.{where}"
    assert says in caught.value.what
    assert caught.value.fix
    with pytest.raises(SpecError) as caught:
        run_of(podOverlay=overlay)
    assert f"spec.cluster.podOverlay.{where}: " in caught.value.what
    assert says in caught.value.what


@pytest.mark.parametrize("name", REFUSED_BY_BOTH)
def test_what_kubectl_refuses_is_refused_in_the_document(name: str, tmp_path: Path) -> None:
    overlay, where, says = REFUSED_BY_BOTH[name]
    is_refused(overlay, where, says)
    assert patched([RICH], overlay, tmp_path) is None


@pytest.mark.parametrize("name", REFUSED_HERE)
def test_what_kubectl_takes_to_no_use_is_refused_in_the_document(name: str, tmp_path: Path) -> None:
    overlay, where, says, _ = REFUSED_HERE[name]
    is_refused(overlay, where, says)
    assert patched([RICH], overlay, tmp_path) is not None


def test_all_that_is_wrong_with_an_overlay_is_told_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        run_of(podOverlay={"spec": {"volumes": [{}, {"name": "a"}, {"$patch": "delete"}], "$x": 1, "containers": {}}})
    lines = caught.value.what.splitlines()
    assert lines[0].startswith("4 thing(s)")
    assert [line.split(": ")[0].strip().removeprefix("spec.cluster.podOverlay.") for line in lines[1:]] == [
        "spec.volumes[0]",
        "spec.volumes[2]",
        "spec.$x",
        "spec.containers",
    ]


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
        {
            "spec": {
                "resourceClaims": [
                    {
                        "name": "gpus",
                        "$retainKeys": ["name", "resourceClaimTemplateName"],
                        "resourceClaimTemplateName": "a",
                    }
                ]
            }
        },
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
        {
            "spec": {
                "containers": [
                    {
                        "name": "new",
                        "env": [{"name": "A", "$patch": "delete"}, {"name": "B"}, {"name": "C"}],
                        "$setElementOrder/env": [{"name": "B"}, {"name": "C"}],
                        "resources": {"$patch": "delete"},
                        "$deleteFromPrimitiveList/args": ["-v"],
                    }
                ]
            }
        },
        {"spec": {"containers": [{"name": "new", "env": [{"name": "B"}, {"name": "C"}]}]}},
        "kubectl leaves them in the pod: a variable that was to go is set, to nothing",
    ),
}  # fmt: skip
"""Name -> overlay, the patch by which kubectl gives what we give, why kubectl's answer to the overlay itself is no use."""


@pytest.mark.parametrize("name", DIFFERENT)
def test_where_kubectl_patch_breaks_the_pod_an_overlay_gives_what_its_explicit_form_gives(
    name: str, tmp_path: Path
) -> None:
    overlay, explicit, _ = DIFFERENT[name]
    ours = [merge(RICH, overlay)]
    assert ours == patched([RICH], explicit, tmp_path)
    assert ours != patched([RICH], overlay, tmp_path)


def test_a_list_that_loses_and_gains_items_in_an_order_is_what_two_patches_make_of_it(tmp_path: Path) -> None:
    """kubectl alone puts the new item elsewhere: Go's list after a deletion shares memory with the list before it."""
    delete, new = {"name": "cache", "$patch": "delete"}, {"name": "new", "emptyDir": {}}
    order = {"$setElementOrder/volumes": [{"name": "tmp"}, {"name": "new"}]}
    ours = merge(PLAIN, volumes(new, delete, **order))
    first = patched([PLAIN], volumes(delete), tmp_path)
    assert first is not None
    assert [ours] == patched(first, volumes(new, **order), tmp_path)
    assert [ours] != patched([PLAIN], volumes(new, delete, **order), tmp_path)


def test_a_volume_of_the_overlay_has_one_source() -> None:
    for source in ("persistentVolumeClaim", "hostPath", "emptyDir", "ephemeral"):
        (cache,) = (
            one
            for one in merge(PLAIN, volumes({"name": "cache", source: {}}))["spec"]["volumes"]
            if one["name"] == "cache"
        )
        assert cache.keys() == {"name", source}


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


def test_every_list_is_merged_as_the_schema_of_each_version_says() -> None:
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
    values = st.fixed_dictionaries(
        {key: identity},
        optional={
            "emptyDir": st.sampled_from([None, {}, {"medium": "Memory"}]),
            "persistentVolumeClaim": st.sampled_from(
                [None, {"claimName": "a"}, {"$patch": "replace", "claimName": "b"}]
            ),
            "args": st.lists(st.sampled_from("ab"), max_size=2),
            "$patch": st.just("delete"),
        },
    )
    return st.lists(values, max_size=4, unique_by=lambda item: item[key]) | st.lists(
        values, max_size=2, unique_by=lambda item: item[key]
    ).map(lambda items: [*items, {"$patch": "replace"}])


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
def test_merging_twice_is_merging_once(overlay: Object) -> None:
    for template in (PLAIN, RICH):
        once = merge(template, overlay)
        assert merge(once, overlay) == once


@given(OVERLAYS)
@settings(deadline=None)
def test_a_merged_template_takes_the_empty_overlay_and_itself_without_change(overlay: Object) -> None:
    merged = merge(RICH, overlay)
    assert merge(merged, {}) == merged
    assert merge(merged, copy.deepcopy(merged)) == merged


@given(OVERLAYS)
@settings(deadline=None)
def test_neither_a_directive_nor_a_null_is_left_in_a_pod(overlay: Object) -> None:
    merged = merge(RICH, overlay)
    assert merged == without_nulls(merged)
    assert '"$' not in json.dumps(merged)


def test_an_empty_overlay_changes_nothing() -> None:
    for template in (PLAIN, RICH):
        for overlay in ({}, {"spec": {}}, {"spec": {"containers": [], "volumes": []}}):
            assert merge(template, overlay) == template


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
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(WORDS),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from(["spec", "metadata"]), JSON, max_size=2))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example({"spec": {"containers": [{"name": {"no": "name"}}]}})
@example({"spec": {"containers": [{"name": "worker", "env": [{"name": None}, 3]}], "volumes": "none"}})
@example({"spec": {"containers": [{"name": "worker", "args": ["a", {}], "$setElementOrder/args": ["a"], 80: {80: 1}}]}})
def test_any_overlay_is_merged_or_refused(overlay: Object) -> None:
    wrong = [one.where for one in refusals(overlay)]
    if wrong:
        assert all(where.startswith("spec.cluster.podOverlay.") for where in wrong)
        with pytest.raises(SpecError):
            merge(RICH, overlay)
    else:
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
