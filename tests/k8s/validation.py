"""Kubernetes' own JSON schemas of each version, as kubernetes-validate ships them; each is read once."""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource

VERSIONS = tuple(f"1.{minor}" for minor in range(29, 38))
"""The versions that PRISM supports."""


@functools.cache
def _read(version: str, name: str) -> Any:
    folder = importlib.resources.files("kubernetes_validate") / f"kubernetes-json-schema/v{version}.0-local-strict"
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


@functools.cache
def _validator(version: str, api_version: str, kind: str) -> Draft202012Validator:
    group, _, rest = api_version.rpartition("/")
    name = "-".join(filter(None, [kind.lower(), group.partition(".")[0], rest]))
    return Draft202012Validator(_read(version, name), registry=_definitions(version))


@functools.cache
def _definitions(version: str) -> Registry[Any]:
    return (Resource.from_contents(_read(version, "_definitions")) @ Registry()).crawl()


def validate(found: dict[str, Any], version: str) -> None:
    """Raises jsonschema.ValidationError where that version of Kubernetes does not know a field, or not with that value."""
    _validator(version, found["apiVersion"], found["kind"]).validate(found)
