"""The CustomResourceDefinition of SelectionRun: `python -m launcher.resource.crd > k8s/crd.yaml`. Makes no requests.

What one field may hold comes from the pydantic models, what ties fields together from `validation_rules`. Whatever the API
server refuses by them, `parse_for_cluster` refuses too. Some documents pass the API server and not `parse_for_cluster` (a part
of a path that is too long, a secret within podOverlay): the operator reports those in the condition Accepted.

**No defaults.** An API server writes the defaults of a definition into each object that it stores, and the object keeps them
when the definition is upgraded. A local run of the same text takes the defaults of the version that runs it. So that only one
place decides what a document means, the stored object is the person's own text, `parse_spec` fills in the defaults, and
descriptions name them for `kubectl explain`. The `spec.yaml` beside a manifest, which replays a run, has every default in it.
"""

from typing import Any

import yaml

from launcher.resource.names import API_GROUP, KIND, LONGEST_NAME, PLURAL, VERSION
from launcher.resource.status import Status
from launcher.resource.structural_schema import Schema, structural_schema
from launcher.resource.validation_rules import validation_rules
from prism_job.spec.document import SelectionRun

NAME = f"{PLURAL}.{API_GROUP}"

ABOUT = "A request to select fine-tuning data by preference-aware influence functions, and how far it has come."

# One row for each column of `kubectl get`; those of priority 1 are shown by `-o wide` only.
COLUMNS = (
    ("Phase", "string", ".status.phase", 0),
    ("Groups", "string", ".status.groups", 0),
    ("Shards", "string", ".status.shards", 0),
    ("Restarts", "integer", ".status.restarts", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Message", "string", ".status.message", 1),
    ("Manifest", "string", ".status.manifest", 1),
)


def crd() -> dict[str, Any]:
    """The CustomResourceDefinition, the same on every call."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": NAME, "labels": {"app.kubernetes.io/name": "prism"}},
        "spec": {
            "group": API_GROUP,
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["sel"],
                # A category of our own: `kubectl get all` does not list runs.
                "categories": ["prism"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [_column(*row) for row in COLUMNS],
                    "schema": {"openAPIV3Schema": _root()},
                }
            ],
        },
    }


def to_yaml() -> str:
    """The content of k8s/crd.yaml."""
    head = "# Written by `python -m launcher.resource.crd > k8s/crd.yaml`. Change prism_job/spec or launcher/resource/crd.py.\n"
    return head + yaml.dump(crd(), Dumper=_NoAliases, sort_keys=False, allow_unicode=True, width=120)


class _NoAliases(yaml.SafeDumper):
    """Anchors are hard to read for people."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _column(name: str, kind: str, path: str, priority: int) -> dict[str, Any]:
    return {"name": name, "type": kind, "jsonPath": path, **({"priority": priority} if priority else {})}


def _root() -> Schema:
    schema = structural_schema(SelectionRun)
    name = schema["properties"]["metadata"]["properties"]["name"]
    # The server adds the rest of ObjectMeta; a definition may restrict only the name.
    schema["properties"]["metadata"] = {"type": "object", "properties": {"name": name | {"maxLength": LONGEST_NAME}}}
    spec = schema["properties"]["spec"]
    # Without an image a cluster can run nothing.
    spec["properties"]["cluster"].pop("nullable")
    spec["required"] = [field for field in spec["properties"] if field in {*spec["required"], "cluster"}]
    schema["properties"]["status"] = structural_schema(Status, written_by_us=True)
    conditions = schema["properties"]["status"]["properties"]["conditions"]
    conditions |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
    for path, rules in validation_rules().items():
        _at(spec, path)["x-kubernetes-validations"] = rules
    schema["description"] = ABOUT
    return schema


def _at(schema: Schema, path: str) -> Schema:
    for name in path.split(".") if path else ():
        schema = schema["properties"][name.removesuffix("[]")]
        schema = schema["items"] if name.endswith("[]") else schema
    return schema


if __name__ == "__main__":
    print(to_yaml(), end="")
