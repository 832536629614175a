"""An address -> its data files in order: files and folders on this machine or in a bucket. Does not know how they are read."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_job.data.readers import KNOWN, Numbered, kind_of, read_file
from prism_job.errors import DataError, RequestError
from prism_job.storage.address import open_store, split_uri
from prism_job.storage.objects import Store

NOT_DATA = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
"""What `datasets` writes beside data. Ignored by name, as hidden files and folders are."""

DESCRIBES = "describes a data set, holds no rows"


@dataclass(frozen=True)
class Source:
    """Rows in order: mostly one data file. Its address for messages, and how its rows are read."""

    uri: str
    read: Callable[[], Iterator[Numbered]]


def list_files(uri: str) -> tuple[list[Source], dict[str, str]]:
    """The data files at a file, folder or prefix in key order, and all other files there with why not.

    Raises:
        RequestError: nothing there, a single file of an unsupported kind, or several splits, of which one must be chosen.
        DataError: a saved data set without one of its files.
    """
    parent, name = split_uri(uri)
    is_bucket = uri.startswith("s3://") and "/" not in uri.removeprefix("s3://").rstrip("/")
    folder = None if is_bucket else open_store(parent)
    if folder is not None and not uri.endswith("/") and not Path(uri).is_dir() and folder.exists(name):
        if kind_of(name) is None:
            raise RequestError("not a kind of data file that PRISM reads", where=uri, fix=f"use {KNOWN}")
        return [_source(folder, name)], {}
    folder = open_store(uri)
    keys = [listed.key for listed in folder.list()]
    if not keys:
        fix = "check the address; ~ and * are not expanded; a data set of the hub is hf://datasets/ORG/NAME"
        raise RequestError("nothing there: no such file, and no folder or prefix with objects", where=uri, fix=fix)
    refuse_unprintable(keys, uri)
    data, others = data_files_at(keys, uri)
    data, unlisted = _in_saved_order(folder, data, [key for key in others if others[key] == DESCRIBES])
    return [_source(folder, key) for key in data], {folder.uri(key): why for key, why in (others | unlisted).items()}


_UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


def refuse_unprintable(keys: list[str], where: str) -> None:
    """Raises RequestError: a file name that would change a log or a terminal."""
    unprintable = [key for key in keys if _UNPRINTABLE.search(key)]
    if unprintable:
        fix = "rename that file: its name holds bytes that are not UTF-8, or control characters"
        raise RequestError(f"a file name that cannot be printed: {unprintable[0]!r}", where=where, fix=fix)


def _source(store: Store, key: str) -> Source:
    def read() -> Iterator[Numbered]:
        with store.as_file(key) as path:
            yield from read_file(path, key, store.uri(key))

    return Source(store.uri(key), read)


def data_files_at(keys: list[str], where: str) -> tuple[list[str], dict[str, str]]:
    """The data files among the keys of a folder, and all others with why not. Raises RequestError: there is none."""
    data: list[str] = []
    others: dict[str, str] = {}
    for key in keys:
        if any(part.startswith(".") for part in key.split("/")):
            others[key] = "hidden"
        elif key.rpartition("/")[2] in NOT_DATA:
            others[key] = DESCRIBES
        elif kind_of(key) is None:
            others[key] = "not a kind of data file that PRISM reads"
        else:
            data.append(key)
    if not data:
        raise RequestError(f"{len(keys)} objects, but none is a data file", where=where, fix=f"PRISM reads {KNOWN}")
    for key in data:
        folder = key.removesuffix("manifest.json")
        if folder != key and {f"{folder}scores.parquet", f"{folder}selected.parquet"} <= set(data):
            fix = "name that manifest.json itself: it stands for the selected rows"
            raise RequestError(f"{key} is of a published selection, not data", where=where, fix=fix)
    return data, others


def _in_saved_order(folder: Store, data: list[str], described: list[str]) -> tuple[list[str], dict[str, str]]:
    """The data files, those of a folder that `save_to_disk` wrote in its order; and what lies there besides (caches of `map`).

    Raises:
        RequestError: a DatasetDict with several splits: read together they would mix tests with training data.
        DataError: a file that state.json lists is missing.
    """
    for key in described:
        if key.rpartition("/")[2] == "dataset_dict.json":
            splits = _read_object(folder, key).get("splits")
            if isinstance(splits, list) and len(splits) > 1:
                where = folder.uri(key).removesuffix("/dataset_dict.json")
                fix = f"name the folder of one: {where}/{splits[0]}"
                raise RequestError(
                    f"a saved data set with the splits {', '.join(map(str, splits))}", where=where, fix=fix
                )
    order = {key: (key, 0) for key in data}
    unlisted: dict[str, str] = {}
    for key in described:
        if key.rpartition("/")[2] != "state.json" or "_data_files" not in (state := _read_object(folder, key)):
            continue
        prefix = key.removesuffix("state.json")
        try:
            listed = [f"{prefix}{entry['filename']}" for entry in state["_data_files"]]
        except (TypeError, KeyError) as error:
            fix = "save the data set again with save_to_disk"
            raise DataError(f"not a list of files: {error!r}", where=folder.uri(key), fix=fix) from error
        if missing := [name for name in listed if name not in order]:
            fix = "copy the folder again: it is not whole"
            raise DataError(f"state.json names {missing[0]}, which is not there", where=folder.uri(key), fix=fix)
        for name in [name for name in order if name.startswith(prefix) and name not in listed]:
            unlisted[name] = "not among the files that state.json lists"
            del order[name]
        order |= {name: (key, number) for number, name in enumerate(listed)}
    return sorted(order, key=lambda name: order[name]), unlisted


def _read_object(folder: Store, key: str) -> dict[str, Any]:
    try:
        found = json.loads(folder.get(key))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
