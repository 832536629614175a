"""What an export wrote, for the documents beside it: the data card, Croissant. Does not write files."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath

from prism_job.publish.export.fields import FieldType
from prism_job.publish.manifest import FileDigest, Manifest
from prism_job.spec.hub_address import HubAddress, is_hub


@dataclass(frozen=True)
class SourceRows:
    """A data file of the candidates, and how many of its rows were selected."""

    uri: str
    name: str  # as a stranger may read it
    num_selected: int


@dataclass(frozen=True)
class Exported:
    """A data file that was written, and the selection it holds."""

    path: str  # from the folder that the documents lie in
    page: str | None  # of the hub's data set
    url: str | None  # where the hub serves the file
    digest: FileDigest
    num_rows: int
    columns: FieldType
    notes: list[str]
    sources: list[SourceRows]  # those with selected rows, most first
    manifest: Manifest


def public_name(uri: str, folders: Iterable[str] = ()) -> str:
    """The uri as a stranger may read it. A path above these folders names people and machines: it is left out."""
    if "://" in uri:
        return uri
    for folder in folders:
        if uri.startswith(f"{folder.rstrip('/')}/"):
            return f"{PurePath(folder).name}{uri[len(folder.rstrip('/')) :]}"
    return PurePath(uri).name


def hub_datasets(sources: list[SourceRows]) -> list[HubAddress]:
    """The data sets of the hub among the sources, each once, at their commits."""
    # A file's name may hold '?', which an address may not.
    found = [HubAddress.parse(source.uri.partition("?")[0]) for source in sources if is_hub(source.uri)]
    return list(dict.fromkeys(HubAddress(address.repo, address.revision) for address in found))


def model_of(manifest: Manifest) -> str:
    """The model, its commit and adapter, as a stranger may read them."""
    model = manifest.spec.spec.model
    commit = manifest.extractor_parts["model"].get("commit")
    name = _model_name(model.uri) + (f" at commit {commit}" if commit else "")
    return f"{name} with the adapter {_model_name(model.adapter)}" if model.adapter else name


def _model_name(uri: str) -> str:
    return public_name(uri) if uri.startswith("/") else uri
