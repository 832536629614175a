"""A data set of the Hugging Face hub as the place of an export: one commit, which overwrites nothing.

Does not know what the files mean.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from prism_job.errors import RequestError, TransientError, one_line
from prism_job.publish.published import digest_of
from prism_job.spec.hub_address import HubAddress

DEFAULT_FILE = "train.jsonl"
"""JSON lines hold any row, and the hub takes the name of the split from it."""


@dataclass(frozen=True)
class HubDataset:
    """A file of a data set of the hub."""

    repo: str
    path: str

    @property
    def uri(self) -> str:
        return str(HubAddress(self.repo, path=self.path))

    @property
    def page(self) -> str:
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/datasets/{self.repo}"

    @property
    def url(self) -> str:
        return f"{self.page}/resolve/main/{quote(self.path)}"


def parse_address(address: str) -> HubDataset:
    """Raises RequestError: not `hf://datasets/ORG/NAME` or `hf://datasets/ORG/NAME/PATH`."""
    try:
        found = HubAddress.parse(address)
    except ValueError:
        found = None
    plain = found and HubAddress(found.repo, path=found.path)
    if found is None or found != plain or "/" not in found.repo or ".." in found.path.split("/"):
        fix = "write hf://datasets/ORG/NAME or hf://datasets/ORG/NAME/PATH; an export goes to the branch main"
        raise RequestError("not the address of a data set of the hub", where=address, fix=fix)
    return HubDataset(found.repo, found.path or DEFAULT_FILE)


def require_token(where: str) -> None:
    """Raises RequestError: there is no token, or the hub is switched off."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise RequestError("HF_HUB_OFFLINE is set", where=where, fix="unset HF_HUB_OFFLINE to push to the hub")
    if not get_token():
        fix = "set HF_TOKEN to a token with the right to write (huggingface.co/settings/tokens)"
        raise RequestError("no token for the hub", where=where, fix=fix)


def push(dataset: HubDataset, files: Mapping[str, Path], message: str, *, public: bool) -> bool:
    """Put the files into the data set in one commit; create it, private unless `public`, where there is none.

    False: all of them are there already, and nothing was committed.

    Raises:
        RequestError: a file with other content is there, or the token may not write.
        TransientError: the hub does not answer, or somebody else commits at the same moment.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    where = f"hf://datasets/{dataset.repo}"
    with _hub_errors(where):
        api.create_repo(dataset.repo, repo_type="dataset", private=not public, exist_ok=True)
        head = api.dataset_info(dataset.repo).sha
        there = api.get_paths_info(dataset.repo, list(files), repo_type="dataset")
    for entry in there:
        if not isinstance(entry, RepoFile) or not _is_same(entry, files[entry.path]):
            fix = "choose another data set or another path; --no-card leaves README.md and croissant.json out"
            raise RequestError("a file with other content is there", where=f"{where}/{entry.path}", fix=fix)
    missing = files.keys() - {entry.path for entry in there}
    if not missing:
        return False
    with _hub_errors(where):
        additions = [CommitOperationAdd(name, str(files[name])) for name in files if name in missing]
        api.create_commit(dataset.repo, additions, commit_message=message, repo_type="dataset", parent_commit=head)
    return True


def _is_same(entry: Any, path: Path) -> bool:
    """By checksum: of the content under LFS, else git's."""
    from huggingface_hub.utils.sha import git_hash

    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == digest_of(path).sha256)
    return bool(entry.blob_id == git_hash(path.read_bytes()))


@contextlib.contextmanager
def _hub_errors(where: str) -> Iterator[None]:
    """Translates the client's errors into ours."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        answer = error.server_message or one_line(error)
        if status == 401:
            fix = "set HF_TOKEN to a valid token with the right to write"
            raise RequestError(f"the hub does not accept the token: {answer}", where=where, fix=fix) from error
        if status in (403, 404):
            fix = "use a token with the right to write there, or a name of your own: hf://datasets/YOU/NAME"
            raise RequestError(f"the token may not write there: {answer}", where=where, fix=fix) from error
        if status in (409, 412):
            fix = "export again: nothing was committed"
            raise TransientError(f"the data set changed at the same moment: {answer}", where=where, fix=fix) from error
        if status == 429 or status >= 500:
            fix = "export again later: nothing was committed"
            raise TransientError(f"the hub failed: {answer}", where=where, fix=fix) from error
        fix = "look at the answer of the hub"
        raise RequestError(f"the hub refuses it: {answer}", where=where, fix=fix) from error
    except errors.HFValidationError as error:
        fix = "write hf://datasets/ORG/NAME/PATH"
        raise RequestError(f"not the name of a data set: {error}", where=where, fix=fix) from error
    except Exception as error:
        fix = "check the network and HF_ENDPOINT, then export again: nothing was committed"
        raise TransientError(f"the hub does not answer: {one_line(error)}", where=where, fix=fix) from error
