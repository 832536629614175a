"""The addresses of a document -> sources of rows, in order, whatever stands behind an address."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from prism_job.data.data_files import Source, list_files
from prism_job.data.hub import list_dataset
from prism_job.plan.chained import is_manifest, selected_source
from prism_job.spec.hub_address import is_hub

NO_PINS: Mapping[str, str] = MappingProxyType({})


def list_sources(uris: Iterable[str], pinned: Mapping[str, str] = NO_PINS) -> tuple[list[Source], dict[str, str]]:
    """The sources of all rows at these addresses, and the files there that hold none, each with why not.

    Args:
        pinned: addresses on the hub -> the same at a commit (`data.hub.pin`), which is read then.

    Raises as `list_files`, `list_dataset` and `selected_source` do.
    """
    sources: list[Source] = []
    ignored: dict[str, str] = {}
    for uri in uris:
        found, others = _list(pinned.get(uri, uri))
        sources += found
        ignored |= others
    return sources, ignored


def _list(uri: str) -> tuple[list[Source], dict[str, str]]:
    if is_hub(uri):
        return list_dataset(uri)
    return ([selected_source(uri)], {}) if is_manifest(uri) else list_files(uri)
