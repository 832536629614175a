"""The addresses of a document -> sources of rows, in order, whatever stands behind an address."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any

from prism_job.data.data_files import Source, list_files
from prism_job.data.hub import list_dataset
from prism_job.errors import DataError, RequestError, TransientError
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


MAX_ERRORS_SHOWN = 10
"""Of wrong addresses: a document may hold hundreds."""

PlannedError = RequestError | DataError | TransientError


def refuse_missing(spec: RunSpec, *, needs_weights: bool = True) -> None:
    """Check every address of models and data, without reading rows or weights, so that one error names all mistakes.

    Once a service did not answer, which takes a minute of retries, no other address with :// is checked.

    Args:
        needs_weights: without them a model's folder may hold its config and tokenizer alone.

    Raises:
        RequestError: some addresses hold nothing to read, whatever else is wrong.
        DataError, TransientError: where only damaged data, or a service that does not answer, are in the way.
    """
    checks: list[tuple[str, str, Callable[[], Any]]] = []
    for field, model in (("spec.model", spec.model), ("spec.scoring.preferenceModel", spec.scoring.preference_model)):
        if model:
            of_preference = model is not spec.model
            check = partial(_check_model, model, needs_weights, is_preference_model=of_preference)
            checks.append((f"{field}.uri", model.uri, check))
            if adapter := model.adapter:
                checks.append((f"{field}.adapter", adapter, partial(model_files.check_files, adapter, is_adapter=True)))
    for field, uris in (("spec.candidates", spec.candidates.uris), ("spec.targets", spec.targets.all_uris())):
        checks += [(field, uri, partial(_list, uri)) for uri in dict.fromkeys(uris)]
    errors: list[PlannedError] = []
    fields: dict[str, None] = {}
    for field, uri, examine in checks:
        is_here = "://" not in uri
        if is_here or not any(isinstance(error, TransientError) for error in errors):
            try:
                examine()
            except (RequestError, DataError, TransientError) as error:
                errors.append(error)
                fields[field] = None
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise _together(errors, fields)


def _check_model(model: ModelSpec, needs_weights: bool, *, is_preference_model: bool) -> None:
    with naming_preference_model() if is_preference_model else nullcontext():
        model_files.read_config(model.uri, model.revision)
        if needs_weights:
            model_files.check_files(model.uri)


def _together(errors: Sequence[PlannedError], fields: Iterable[str]) -> PlannedError:
    """One error of the family that decides: a wrong request stays wrong, damaged data stay damaged, a service may answer."""
    families = (RequestError, DataError, TransientError)
    family = next(each for each in families if any(isinstance(error, each) for error in errors))
    shown = list(dict.fromkeys(f"{error.where}: {error.what}" for error in errors))
    more = f"; and {len(shown) - MAX_ERRORS_SHOWN} more" if len(shown) > MAX_ERRORS_SHOWN else ""
    what = f"{len(errors)} addresses of the document cannot be read: {'; '.join(shown[:MAX_ERRORS_SHOWN])}{more}"
    return family(what, where=", ".join(fields), fix="; ".join(dict.fromkeys(error.fix for error in errors)))
