"""The files of a model: their identity, and a copy on this machine. Does not look into them.

A model is a hub id, a folder, an s3:// prefix or one .gguf file. Only safetensors, GGUF and text files are read: no pickles,
and no code.
"""

import contextlib
import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prism_job.errors import DataError, RequestError, TransientError, one_line
from prism_job.spec.digest import digest
from prism_job.storage.address import open_store, split_uri
from prism_job.storage.objects import Listed, Store

READ_PATTERNS = ("*.safetensors", "*.gguf", "*.json", "*.jinja", "*.model", "*.txt")
"""Files that can change a number. All others (pickles, code, model cards) are neither read nor hashed."""

TEMPLATES = "additional_chat_templates/"
"""The only subfolder of a model that transformers reads: chat templates by name, such as `tool_use`."""


def identify(uri: str, revision: str = "main", *, is_adapter: bool = False) -> dict[str, str]:
    """The identity of the model's content: file name -> digest, or the commit of a hub model.

    Raises:
        RequestError: nothing there, or no safetensors or GGUF weights.
        TransientError: the hub does not answer.
    """
    if _is_hub(uri):
        return {"hub": uri, "commit": _hub_commit(uri, revision)}
    store, files = _files(uri, is_adapter)
    return {file.key: _sha256(path) if (path := store.local_path(file.key)) else _tag(file) for file in files}


def check_files(uri: str, *, is_adapter: bool = False) -> None:
    """Raises RequestError as `identify` does, without reading weights. A model on the hub is checked when it is fetched."""
    if not _is_hub(uri):
        _files(uri, is_adapter)


def fetch_model(uri: str, revision: str = "main", *, is_adapter: bool = False) -> Path:
    """A local path of the model: its folder, or its .gguf file.

    Hub and s3:// models are copied to the cache once per node: one rank downloads, the others wait and share the files. An
    interrupted download resumes; a file has its name only once it is whole and checked.

    Raises:
        TransientError: the network or the server failed, or a download fails its checksum.
        DataError: the model changed while it was read.
        RequestError: no such model, or a cache folder that cannot be written.
    """
    if _is_hub(uri):
        snapshot = _hub_snapshot(uri, _hub_commit(uri, revision))  # locks, resumes and checks by itself
        _files(snapshot, is_adapter)
        return Path(snapshot)
    store, files = _files(uri, is_adapter)
    if store.local_path(files[0].key):
        return Path(uri)
    target = cache_folder() / digest({file.key: _tag(file) for file in files})
    if not all(_is_here(target, file) for file in files):
        _download_under_lock(store, files, target)
    return target / files[0].key if uri.endswith(".gguf") else target


def _download_under_lock(store: Store, files: list[Listed], target: Path) -> None:
    from filelock import FileLock

    try:
        target.mkdir(parents=True, exist_ok=True)
        # flock: the kernel releases it when its holder ends, in whatever way.
        lock = FileLock(target.with_name(f"{target.name}.lock")).acquire()
    except OSError as error:
        fix = "set PRISM_CACHE to a folder that can be written, with room for the model"
        raise RequestError(
            f"the model cache cannot be written: {error.strerror}", where=str(target), fix=fix
        ) from error
    with lock:
        for file in files:
            if not _is_here(target, file):
                (target / file.key).parent.mkdir(parents=True, exist_ok=True)
                store.download(file.key, target / file.key, file.tag)


def _is_here(target: Path, file: Listed) -> bool:
    path = target / file.key
    return path.is_file() and path.stat().st_size == file.size_bytes


def _tag(file: Listed) -> str:
    return f"{file.size_bytes}-{file.tag}"


def fetch_config_and_tokenizer(uri: str, revision: str = "main") -> Path:
    """A local path of the model's config, tokenizer and templates. Weights may be absent.

    A GGUF file is downloaded whole, as it contains them.

    Raises:
        RequestError: nothing there.
        TransientError: the hub does not answer.
    """
    patterns = [pattern for pattern in READ_PATTERNS if pattern not in ("*.safetensors", "*.gguf")]
    if _is_hub(uri):
        from huggingface_hub import snapshot_download

        with _hub_errors(uri):
            return Path(snapshot_download(uri, revision=revision, allow_patterns=patterns))
    if uri.endswith(".gguf"):
        return fetch_model(uri)
    store = _open_folder(uri)
    if not uri.startswith("s3://"):
        return Path(uri)
    files = _matching(list(store.list()), patterns)
    target = cache_folder() / digest([uri, *(f"{file.key} {file.tag}" for file in files)])
    for file in files:
        (target / file.key).parent.mkdir(parents=True, exist_ok=True)
        unfinished = target / f"{file.key}.{os.getpid()}.part"
        store.download(file.key, unfinished)
        unfinished.rename(target / file.key)
    return target


def read_config(uri: str, revision: str = "main") -> dict[str, Any]:
    """The model's config.json; empty for a GGUF file, which has none.

    Raises:
        RequestError: no such model, or no config.json there.
        TransientError: the hub does not answer.
    """
    if uri.endswith(".gguf"):
        check_files(uri)
        return {}
    store = open_store(str(fetch_config_and_tokenizer(uri, revision))) if _is_hub(uri) else _open_folder(uri)
    if not store.exists("config.json"):
        if store.exists("adapter_config.json"):
            raise _adapter_as_model(uri)
        fix = "put the model's config.json beside its weights (save_pretrained writes it)"
        raise RequestError("there is no config.json", where=uri, fix=fix)
    try:
        return dict(json.loads(store.get("config.json")))
    except (ValueError, TypeError) as error:
        fix = "copy config.json again: it must hold one JSON object"
        raise RequestError(f"config.json cannot be read: {error}", where=store.uri("config.json"), fix=fix) from error


def model_types(uri: str, revision: str = "main") -> set[str]:
    """`model_type` of config.json and of its parts; empty for a GGUF file. Raises as `read_config` does."""
    config = read_config(uri, revision)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return {kind for part in parts if isinstance(kind := part.get("model_type"), str)}


def _matching(listed: list[Listed], patterns: Sequence[str]) -> list[Listed]:
    """The model's own files of these patterns, and its templates."""
    return [
        file
        for file in listed
        if "/" not in file.key.removeprefix(TEMPLATES)
        and any(fnmatch.fnmatch(file.key, pattern) for pattern in patterns)
    ]


def cache_folder() -> Path:
    """Cache of models from S3: $PRISM_CACHE, or ~/.cache/prism."""
    return Path(os.environ.get("PRISM_CACHE") or Path.home() / ".cache" / "prism") / "models"


def _is_hub(uri: str) -> bool:
    return not uri.startswith("s3://") and not Path(uri).exists() and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", uri))


def _files(uri: str, is_adapter: bool) -> tuple[Store, list[Listed]]:
    if uri.endswith(".gguf"):
        parent, name = split_uri(uri)
        store = open_store(parent)
        if path := store.local_path(name):
            files = [Listed(name, path.stat().st_size, "", path.stat().st_mtime)] if path.exists() else []
        else:
            files = [file for file in store.list(name) if file.key == name]
        if not files:
            raise RequestError("no such GGUF file", where=uri, fix="check model.uri")
        return store, files
    store = _open_folder(uri)
    everything = list(store.list())
    if not everything:
        fix = "check the address: give a hub id (org/name), a folder, an s3:// prefix or a .gguf file"
        raise RequestError("nothing there: no such prefix, or an empty folder", where=uri, fix=fix)
    files = _matching(everything, READ_PATTERNS)
    keys = [file.key for file in files]
    if not is_adapter and "adapter_config.json" in keys:
        raise _adapter_as_model(uri)
    if not any(key.endswith(".safetensors") for key in keys):
        fix = "save the model as safetensors (save_pretrained does); pickled weights (.bin, .pt) are not read"
        raise RequestError("no .safetensors weights there", where=uri, fix=fix)
    for key in keys:
        if key.endswith(".safetensors.index.json"):
            _check_index(store, key, keys)
    return store, files


def _adapter_as_model(uri: str) -> RequestError:
    fix = "name the base model in model.uri and this folder in model.adapter"
    return RequestError("this is an adapter, not a model", where=uri, fix=fix)


def _open_folder(uri: str) -> Store:
    if not uri.startswith("s3://") and not Path(uri).is_dir():
        fix = "give a hub id (org/name), a folder, an s3:// prefix or a .gguf file"
        raise RequestError("no such model", where=uri, fix=fix)
    return open_store(uri)


def _check_index(store: Store, key: str, keys: list[str]) -> None:
    """An index may name any file. One in another folder, or a pickle, would be loaded although the digest does not cover it."""
    try:
        named = {str(name) for name in json.loads(store.get(key))["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fix = "copy or convert the checkpoint again"
        raise DataError(f"not an index of weight files: {error!r}", where=store.uri(key), fix=fix) from error
    uncovered = sorted(name for name in named if name not in keys or not name.endswith(".safetensors"))
    if uncovered:
        fix = "put all weights into the model's own folder, as safetensors: other files are not read"
        what = f"the index names {uncovered[0]}, which is not a safetensors file of this folder"
        raise RequestError(what, where=store.uri(key), fix=fix)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hub_commit(repo: str, revision: str) -> str:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE or re.fullmatch(r"[0-9a-f]{40}", revision):
        return Path(_hub_snapshot(repo, revision)).name if constants.HF_HUB_OFFLINE else revision
    with _hub_errors(repo):
        return str(HfApi().model_info(repo, revision=revision).sha)


def _hub_snapshot(repo: str, revision: str) -> str:
    from huggingface_hub import snapshot_download

    with _hub_errors(repo):
        return str(snapshot_download(repo, revision=revision, allow_patterns=list(READ_PATTERNS)))


@contextlib.contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Translates the hub's errors, naming the model."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        fix = "check the id and revision; for a gated or private model set HF_TOKEN; a local folder must exist"
        what = "there is no such folder, and the hub has no such model, or it is private"
        raise RequestError(what, where=repo, fix=fix) from error
    except Exception as error:
        fix = "check the network, or download the model and name its folder in model.uri"
        what = f"there is no such folder, and the hub does not answer: {one_line(error)}"
        raise TransientError(what, where=repo, fix=fix) from error
