"""The addresses of a document -> sources of rows, in order, whatever stands behind an address."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from prism_job.data.data_files import Source, list_files
from prism_job.data.hub import list_dataset
from prism_job.errors import RequestError, TransientError
from prism_job.plan.chained import is_manifest, selected_source
from prism_job.spec.document import RunSpec
from prism_job.spec.hub_address import is_hub
from prism_job.spec.model import ModelSpec, naming_preference_model
from prism_job.storage import model_files

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


def refuse_missing(spec: RunSpec) -> None:
    """Look once at every address of models and data, without reading rows or weights, so that one error names all mistakes.

    Raises:
        RequestError: nothing to read behind some of them.
        TransientError: a service did not answer, and nothing else is wrong.
    """
    errors: list[RequestError | TransientError] = []

    def look(at: Callable[[Any], Any], address: Any) -> None:
        try:
            at(address)
        except (RequestError, TransientError) as error:
            errors.append(error)

    look(_look_at_model, spec.model)
    if spec.scoring.preference_model:
        look(_look_at_preference_model, spec.scoring.preference_model)
    for uri in dict.fromkeys((*spec.candidates.uris, *spec.targets.all_uris())):
        look(_list, uri)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        what = f"{len(errors)} addresses of the document cannot be read: " + "; ".join(
            f"{error.where}: {error.what}" for error in errors
        )
        family = next((RequestError for error in errors if isinstance(error, RequestError)), TransientError)
        fixes = "; ".join(dict.fromkeys(error.fix for error in errors))
        raise family(what, where=", ".join(error.where for error in errors), fix=fixes)


def _look_at_model(model: ModelSpec) -> None:
    model_files.read_config(model.uri, model.revision)
    if model.adapter:
        model_files.identify(model.adapter, is_adapter=True)


def _look_at_preference_model(model: ModelSpec) -> None:
    with naming_preference_model():
        _look_at_model(model)
