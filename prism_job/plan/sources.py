"""The addresses of a document -> sources of rows, in order, whatever stands behind an address."""

from collections.abc import Iterable

from prism_job.data import data_files
from prism_job.data.data_files import Source
from prism_job.plan.chained import is_manifest, selected_source


def list_sources(uris: Iterable[str]) -> tuple[list[Source], dict[str, str]]:
    """The sources of all rows at these addresses, and the files there that hold none, each with why not.

    Raises as `data_files.list_files` and `chained.selected_source` do.
    """
    sources: list[Source] = []
    ignored: dict[str, str] = {}
    for uri in uris:
        found, others = ([selected_source(uri)], {}) if is_manifest(uri) else data_files.list_files(uri)
        sources += found
        ignored |= others
    return sources, ignored
