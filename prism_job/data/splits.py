"""The file names of a data set's repository -> the files of one split, as `datasets` resolves them. Sends no request, runs no
code of the repository."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from prism_job.data.data_files import DESCRIBES
from prism_job.data.readers import KNOWN, kind_of
from prism_job.errors import DataError, RequestError
from prism_job.spec.hub_address import HubAddress

_READ_PARAMETERS = {"data_files", "data_dir", "default", "version", "description", "features", "drop_labels"}
"""Of a config in README.md. Any other changes how its files are read (`sep`, `field`), which PRISM would not do."""


def files_of_split(names: Sequence[str], card: Path | None, address: HubAddress) -> list[str]:
    """The files of the config and split, in the order in which `datasets` reads them.

    Args:
        names: all files of the repository.
        card: its README.md, whose header may list configs; None where there is none.

    Raises:
        RequestError: no such config or split, or several, of which one must be chosen; or files that PRISM does not read.
        DataError: the header of the card cannot be read.
    """
    if ".huggingface.yaml" in names:
        fix = "name the files by a path: hf://datasets/ORG/NAME/PATH"
        raise RequestError(
            "its configs lie in .huggingface.yaml, which PRISM does not read", where=str(address), fix=fix
        )
    with tempfile.TemporaryDirectory(prefix="prism-") as folder:
        root = Path(folder).resolve()
        configs, default = _configs(card, address)
        config = _chosen("config", address.config, list(configs), default, address)
        splits = _resolve(root, names, configs[config], address)
        split = _chosen("split", address.split, list(splits), None, address)
        files = [Path(file).relative_to(root).as_posix() for file in splits[split]]
    if unread := [file for file in files if kind_of(file) is None]:
        what = f"the split {split} has files that PRISM does not read, such as {unread[0]}"
        fix = f"PRISM reads {KNOWN}; the hub's own copy as parquet is at @refs/convert/parquet"
        raise RequestError(what, where=str(address), fix=fix)
    return files


def others_of(names: Sequence[str], files: Sequence[str]) -> dict[str, str]:
    """The data files that are not of the split, with the reason. Does not list other files."""
    return {
        name: DESCRIBES if PurePosixPath(name).name.startswith("dataset_info") else "not a file of that split"
        for name in sorted(set(names) - set(files))
        if kind_of(name) is not None
    }


def _is_inside(name: str) -> bool:
    """A path below the data set, for `datasets` too: it takes `file:…`, `https:…` and `zip::…` as addresses."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "::" not in name and not urlsplit(name).scheme


def _configs(card: Path | None, address: HubAddress) -> tuple[dict[str, dict[str, Any]], str | None]:
    """Name of each config -> its parameters in the card, and which is the default. Without any: one, by the files' names."""
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    try:
        data = DatasetCard.load(card, ignore_metadata_errors=False).data if card else None
        configs = MetadataConfigs.from_dataset_card_data(data) if data else MetadataConfigs()
        default = configs.get_default_config_name()
    except Exception as error:  # whatever stands in that file
        fix = "name the files by a path: hf://datasets/ORG/NAME/PATH"
        what = f"the header of README.md cannot be read: {' '.join(str(error).split())[:300]}"
        raise DataError(what, where=str(address), fix=fix) from error
    return dict(configs) or {"default": {}}, default


def _resolve(root: Path, names: Sequence[str], config: dict[str, Any], address: HubAddress) -> dict[str, list[str]]:
    """Split -> paths below `root`, where empty files get these names: `datasets` looks at names alone."""
    from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns
    from datasets.load import infer_module_for_data_files
    from datasets.packaged_modules import _ALL_ALLOWED_EXTENSIONS, _MODULE_TO_EXTENSIONS

    fix = "name the files by a path: hf://datasets/ORG/NAME/PATH"
    if unread := sorted(set(config) - _READ_PARAMETERS):
        raise RequestError(
            f"the config has the parameter {unread[0]}, which PRISM does not apply", where=str(address), fix=fix
        )
    try:
        for name in filter(_is_inside, names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        base = root / (config.get("data_dir") or "")
        if not base.resolve().is_relative_to(root):
            raise ValueError(f"the card names {config['data_dir']}, outside the data set")
        patterns = sanitize_patterns(config["data_files"]) if "data_files" in config else get_data_patterns(str(base))
        if outside := [it for them in patterns.values() for it in them if not _is_inside(it)]:
            raise ValueError(f"the card names {outside[0]}, outside the data set")
        found = DataFilesDict.from_patterns(patterns, str(base), allowed_extensions=_ALL_ALLOWED_EXTENSIONS)
        if not config:
            kind, _ = infer_module_for_data_files(found)
            found = found.filter(extensions=_MODULE_TO_EXTENSIONS[kind])
        if not any(found.values()):
            raise ValueError("the config names none")
    except Exception as error:  # whatever names and the card hold
        what = f"no data files are found: {' '.join(str(error).replace(f'{root}/', '').split())[:300]}"
        raise RequestError(what, where=str(address), fix=f"{fix}. PRISM reads {KNOWN}") from error
    return {str(split): list(files) for split, files in found.items() if files}


def _chosen(kind: str, wanted: str | None, known: list[str], default: str | None, address: HubAddress) -> str:
    listed = f"{', '.join(known[:20])}{', …' if len(known) > 20 else ''}"
    if wanted is not None and wanted not in known:
        raise RequestError(f"there is no {kind} {wanted}", where=str(address), fix=f"{kind}s there: {listed}")
    if (name := wanted or default or (known[0] if len(known) == 1 else None)) is None:
        example = replace(address, **{kind: known[0]})
        fix = f"choose one: {example}; to read several, list the address once for each"
        raise RequestError(f"the data set has {len(known)} {kind}s: {listed}", where=str(address), fix=fix)
    return name
