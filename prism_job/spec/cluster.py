"""The section `spec.cluster`: the pods of a submitted run. `launcher/render` makes them."""

import json
import re
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from prism_job.spec.section import Section

DnsName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
"""The name of an object in a cluster."""

Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$", max_length=32)]
"""A Kubernetes quantity: 500m, 8, 16Gi."""

SECRET_NAME = (
    "(?i)(SECRET|PASSWORD|PASSWD|(ACCESS|PRIVATE|API)_?KEY|TOKEN($|[^A-Za-z])|(API|AUTH|ACCESS|HF|GH)_?TOKENS)"
)
NO_SECRET_NAME = (
    "(?i)(_(FILE|PATH|URI|URL)$|^(MAX|MIN|NUM|PAD|EOS|BOS|UNK|SEP|CLS|MASK)_TOKEN(_ID|_LENGTH|_COUNT)?$"
    "|^TOKEN_(LIMIT|LENGTH|COUNT|BUDGET)$)"
)
"""An environment variable whose name matches the first and not the second holds a secret; its value may not be in a document.
HF_TOKEN does; MAX_NEW_TOKENS, PAD_TOKEN_ID, TOKENIZERS_PARALLELISM and AWS_WEB_IDENTITY_TOKEN_FILE do not. Written without
lookahead, so that an API server (RE2) takes the same expressions from launcher/resource/crd.py."""


def is_secret_name(name: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    return bool(re.search(SECRET_NAME, name)) and not re.search(NO_SECRET_NAME, name)


class SecretKeyRef(Section):
    """A key of a Secret in the run's namespace."""

    name: DnsName = Field(description="Name of the Secret.")
    key: Annotated[str, StringConstraints(pattern=r"^[-._a-zA-Z0-9]+$", max_length=253)] = Field(
        description="Key within it."
    )


class ValueFrom(Section):
    """Where a variable's value comes from."""

    secret_key_ref: SecretKeyRef = Field(description="A key of a Secret.")


class EnvVar(Section):
    """An environment variable of the worker pods."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)] = Field(
        description="Name of the variable, such as AWS_ENDPOINT_URL."
    )
    value: Annotated[str, StringConstraints(max_length=4096)] | None = Field(
        None,
        description="Its value, visible to everyone who can read the run. Refused for names of secrets, such as HF_TOKEN.",
    )
    value_from: ValueFrom | None = Field(None, description="Where its value comes from.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.value is None) == (self.value_from is None):
            raise ValueError(f"{self.name}: give exactly one of value, valueFrom")
        if self.value is not None and is_secret_name(self.name):
            raise ValueError(f"{self.name} is a secret; put it into a Secret and name it by valueFrom.secretKeyRef")
        return self


DEEPEST_OVERLAY, LARGEST_OVERLAY = 20, 32_768
"""Levels, and bytes of compact JSON. Every Job contains the overlay: with 256 groups that is 8 MiB in the API server."""


def _check_overlay(overlay: dict[str, Any]) -> dict[str, Any]:
    """Level by level, without recursion: deeper levels are not read."""
    level: list[Any] = [overlay]
    for _ in range(DEEPEST_OVERLAY):
        mappings = [it for it in level if isinstance(it, dict)]
        for it in mappings:
            if it.get("value") is not None and is_secret_name(str(it.get("name", ""))):
                raise ValueError(f"{it['name']} is a secret; name it by valueFrom.secretKeyRef")
        lists = [it for it in level if isinstance(it, list)]
        level = [inner for it in mappings for inner in it.values()] + [inner for it in lists for inner in it]
        if len(level) > LARGEST_OVERLAY:
            raise ValueError(f"has more than {LARGEST_OVERLAY:,} entries")
    if any(isinstance(it, dict | list) for it in level):
        raise ValueError(f"is nested deeper than {DEEPEST_OVERLAY} levels")
    try:
        text = json.dumps(overlay, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=str)
    except TypeError as error:
        raise ValueError(f"is not JSON: {error}") from error
    if len(text.encode()) > LARGEST_OVERLAY:
        raise ValueError(f"has {len(text.encode()):,} bytes as JSON; at most {LARGEST_OVERLAY:,}")
    return overlay


class ClusterSpec(Section):
    """The pods of a submitted run. Local runs ignore it."""

    image: str = Field(
        min_length=1, max_length=512, description="Worker image; pin it by digest to make runs reproducible."
    )
    groups: int = Field(
        1,
        ge=1,
        le=256,
        description="Number of DeepSpeed worlds. They share only the store, so one can fail without the others.",
    )
    nodes_per_group: int = Field(1, ge=1, le=256, description="Pods of each group.")
    gpus_per_node: int = Field(1, ge=0, le=16, description="GPUs per pod, with one rank each. 0: one rank on the CPU.")
    cpu: Quantity = Field("2", description="CPU cores that each pod requests.")
    memory: Quantity = Field("8Gi", description="Memory that each pod requests; also its limit.")
    shared_memory: Quantity = Field("1Gi", description="Size of /dev/shm; counts as memory of the pod.")
    scratch: Quantity = Field(
        "50Gi", description="Disk for caches and temporary files: the model's files, and about 100 bytes per candidate."
    )
    weights_claim: DnsName | None = Field(
        None,
        description="PersistentVolumeClaim that caches models from S3 and the hub across pods; without it each downloads them.",
    )
    service_account: DnsName | None = Field(
        None, description="Service account of the pods, for cloud roles bound to it. Its token is not mounted."
    )
    env: Annotated[tuple[EnvVar, ...], Field(max_length=64)] = Field(
        (), description="Environment variables of the worker pods."
    )
    queue_name: DnsName | None = Field(None, description="Kueue local queue; without it Kueue is not used.")
    priority_class: DnsName | None = Field(None, description="Priority class of the pods.")
    max_restarts: int = Field(
        3, ge=0, le=100, description="Restarts of a stage, or of a group, after crashes; more fail the run."
    )
    max_preemptions: int = Field(
        50,
        ge=0,
        le=1000,
        description="Restarts of a stage, or of a group, after evictions, counted separately and started at once.",
    )
    startup_timeout_seconds: int = Field(
        1800,
        ge=10,
        le=604_800,
        description="Seconds; a stage without a running pod after this time fails with the reason.",
    )
    pod_overlay: Annotated[dict[str, Any], AfterValidator(_check_overlay)] = Field(
        {},
        description="Strategic merge patch on the pod template, as `kubectl patch` applies it: tolerations, volumes, another "
        "runtime. A volume with another source replaces the source. At most 32 KiB and 20 levels deep.",
    )

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.groups * self.nodes_per_group > MAX_PODS:
            raise ValueError(f"groups × nodesPerGroup is {self.groups * self.nodes_per_group}; at most {MAX_PODS}")
        return self


MAX_PODS = 1024
"""Limit of one run."""
