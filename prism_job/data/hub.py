"""Data sets of the Hugging Face hub as sources: which commit, which files. Files go through the hub's cache (HF_HOME).

The token is that of the hub's own client: HF_TOKEN. Does not run code of a repository.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prism_job.data import splits
from prism_job.data.data_files import Source, data_files_at, refuse_unprintable
from prism_job.data.readers import Numbered, read_file
from prism_job.errors import DataError, RequestError, TransientError, one_line
from prism_job.spec.hub_address import HubAddress, is_hub
from prism_job.storage.folder import local_errors
from prism_job.storage.retries import with_retries


def pin(uris: Iterable[str]) -> dict[str, str]:
    """Each hub address among these -> the same at the commit that its revision is now. Raises as `list_dataset` does."""
    return {uri: str(_at_commit(HubAddress.parse(uri))[0]) for uri in dict.fromkeys(uris) if is_hub(uri)}


def list_dataset(uri: str) -> tuple[list[Source], dict[str, str]]:
    """The data files of a hub address in the order of `datasets`, each named with its commit; other data files with why not.

    Raises:
        RequestError: no such data set, revision, config, split or path; renamed, gated or private; or the hub is switched off.
        TransientError: the hub does not answer.
        DataError: the data set's card is damaged.
    """
    address = HubAddress.parse(uri)
    pinned, names = _at_commit(address)
    refuse_unprintable(names, uri)
    folder = HubAddress(pinned.repo, pinned.revision)
    if address.path:
        below = [name for name in names if name == address.path or name.startswith(f"{address.path}/")]
        if not below:
            fix = "check the path; the data set's page lists its files"
            raise RequestError("the data set has no such file or folder", where=uri, fix=fix)
        files, others = data_files_at(below, uri)
    else:
        card = _download(folder, "README.md") if "README.md" in names else None
        files = splits.files_of_split(names, card, address)
        others = splits.others_of(names, files)
    return [_source(folder, name) for name in files], {_uri(folder, name): why for name, why in others.items()}


def _uri(folder: HubAddress, name: str) -> str:
    return str(dataclasses.replace(folder, path=name))


def _source(folder: HubAddress, name: str) -> Source:
    def read() -> Iterator[Numbered]:
        path = _download(folder, name)
        with local_errors(str(path)):
            yield from read_file(path, name, _uri(folder, name))

    return Source(_uri(folder, name), read)


def _at_commit(address: HubAddress) -> tuple[HubAddress, list[str]]:
    """The address at its commit, and the names of all files there."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        fix = "unset HF_HUB_OFFLINE, or name a folder: hf download --repo-type dataset ORG/NAME --local-dir FOLDER"
        raise RequestError("HF_HUB_OFFLINE is set: the hub cannot be asked", where=str(address), fix=fix)

    def ask() -> Any:
        with _hub_errors(str(address), address.repo):
            return HfApi().dataset_info(address.repo, revision=address.revision)

    info = with_retries(ask)
    if info.id != address.repo:
        fix = f"write {dataclasses.replace(address, repo=info.id)}"
        raise RequestError(f"the data set is now called {info.id}", where=str(address), fix=fix)
    return address.at(info.sha), sorted(sibling.rfilename for sibling in info.siblings or ())


def _download(folder: HubAddress, name: str) -> Path:
    """The file in the hub's cache; the client locks, resumes and checks by itself."""
    from huggingface_hub import hf_hub_download

    def fetch() -> Path:
        with _hub_errors(_uri(folder, name), folder.repo):
            return Path(hf_hub_download(folder.repo, name, repo_type="dataset", revision=folder.revision))

    return with_retries(fetch)


@contextlib.contextmanager
def _hub_errors(where: str, repo: str) -> Iterator[None]:
    """Translates the errors of the hub's client into the three families."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        fix = f"accept its terms at https://huggingface.co/datasets/{repo}, and set HF_TOKEN to a token of that account"
        raise RequestError("the data set is gated", where=where, fix=fix) from error
    except errors.RepositoryNotFoundError as error:
        fix = "check the id, ORG/NAME; for a private data set set HF_TOKEN"
        raise RequestError("the hub has no such data set, or it is private", where=where, fix=fix) from error
    except errors.RevisionNotFoundError as error:
        fix = "check the branch, tag or commit after '@'"
        raise RequestError("the data set has no such revision", where=where, fix=fix) from error
    except (errors.DisabledRepoError, errors.HFValidationError) as error:
        raise RequestError(f"the hub refuses: {one_line(error)}", where=where, fix="check the id, ORG/NAME") from error
    except errors.RemoteEntryNotFoundError as error:
        raise DataError("the file is gone from the hub", where=where, fix="run the plan again") from error
    except Exception as error:  # the client's own errors, and those of its HTTP library
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            with local_errors(str(error.filename or where), writing=True):  # the hub's cache on this machine
                raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            fix = "check HF_TOKEN: it may have expired, or lack the right to read"
            raise RequestError(f"the hub refuses: {one_line(error)}", where=where, fix=fix) from error
        fix = "check the network and HF_ENDPOINT, then run again: finished downloads are kept"
        raise TransientError(f"the hub does not answer: {one_line(error)}", where=where, fix=fix) from error
