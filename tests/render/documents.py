"""Documents of runs, from the minimal one to one with every field, and their rendered objects."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from launcher.render.run_objects import run_objects
from launcher.resource.document import parse_for_cluster
from launcher.resource.names import ATTEMPT_LABEL, GROUP_LABEL, ROUND_LABEL, STAGE_LABEL, labels_of_run
from prism_job.spec.document import SelectionRun
from tests.run_document import run_document

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
    document = run_document(name, **{"image": "registry/prism@sha256:" + "0" * 64, **cluster})
    document["metadata"]["labels"] = labels or {}
    document["spec"]["candidates"]["uris"].append("s3://bucket/größe 😀.jsonl")
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
