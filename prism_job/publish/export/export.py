"""The verb `export`: the selected subset as training data, in a file or in a data set of the hub, with documents beside it.

Documents are the data card and Croissant; all that describes the data file to others belongs in DOCUMENTS. What trainers
need beside the file comes from trainers.py.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from prism_job.errors import RequestError
from prism_job.publish.export import hub
from prism_job.publish.export.card import data_card
from prism_job.publish.export.croissant import croissant
from prism_job.publish.export.exported import Exported, SourceRows, public_name
from prism_job.publish.export.fields import FieldType, seen
from prism_job.publish.export.files import writer_of
from prism_job.publish.export.notes import Notes
from prism_job.publish.export.rows import Columns, export_rows
from prism_job.publish.export.trainers import TRAINERS, Contents, Place, entries_of, in_a_line
from prism_job.publish.origins import Origins
from prism_job.publish.published import Published, digest_of, load
from prism_job.storage.address import open_store, split_uri
from prism_job.storage.folder import local_errors
from prism_job.storage.objects import Store

DOCUMENTS: dict[str, Callable[[Exported], str]] = {"README.md": data_card, "croissant.json": croissant}
"""Files beside the data: name -> its text."""


def export(
    manifest_uri: str,
    destination: str,
    columns: Columns | None = None,
    *,
    card: bool | None = None,
    public: bool = False,
) -> dict[str, Any]:
    """Write the subset to a path, an s3:// address or hf://datasets/ORG/NAME; the ending of the file is its kind.

    Args:
        columns: what each row becomes. None: the candidate's own row.
        card: write DOCUMENTS beside the file. None: on the hub only. The entries of trainers are written where `columns`
            names a format, unless this is False.
        public: a data set that is created on the hub can be read by all.

    Raises:
        RequestError: another ending, `public` without the hub, a row that the format cannot hold, or a file is there
            already: an export overwrites nothing. Documents, and files on the hub, may be there with the same content.
            An entry of a trainer that is there with other content stays, and a note gives the new one.
        DataError: the selection, or the rows the store keeps for it, are damaged.
        TransientError: the hub or the bucket does not answer.
    """
    dataset = hub.parse_address(destination) if destination.startswith("hf://") else None
    if dataset is None:
        if public:
            fix = "leave --public out, or export to hf://datasets/ORG/NAME"
            raise RequestError("--public is for a data set of the hub", where=destination, fix=fix)
        parent, name = split_uri(destination)
        write, target = writer_of(destination), open_store(parent)
        _refuse_existing(target, name)
    else:
        name, write = dataset.path, writer_of(dataset.uri)
        hub.require_token(destination)
    selection = load(manifest_uri).check()
    with_documents = dataset is not None if card is None else card
    columns, notes, kinds, contents = columns or Columns(), Notes(), FieldType(), Contents()
    with_entries = columns.format is not None and card is not False
    rows = export_rows(selection, columns, notes)
    rows = contents.seen(rows) if with_entries else rows  # a candidate's own row may have any value in any column
    rows = seen(rows, kinds) if with_documents else rows
    with tempfile.TemporaryDirectory(prefix="prism-") as folder:
        path = Path(folder) / Path(name).name
        with local_errors(str(path), writing=True):
            write(path, destination, rows, notes)
        documents = {}
        if with_documents:
            exported = _describe(selection, path, dataset, name, kinds, notes)
            documents = {title: _written(Path(folder) / title, text(exported)) for title, text in DOCUMENTS.items()}
        entries: dict[str, Path] = {}
        about: list[str] = notes.lines()
        if with_entries:
            place = Place(dataset.uri, dataset.repo) if dataset else Place(_full_uri(target, name))
            texts, refusals = entries_of(place, contents)
            about += refusals
            entries = {title: _written(Path(folder) / title, text) for title, text in texts.items()}
        facts = {"rows": selection.manifest.counts.selected, "notes": about}
        if dataset is None:
            for title, document in documents.items():
                _put_new(target, title, document)
            for title, entry in entries.items():
                about += _put_entry(target, title, entry)
            _refuse_existing(target, name)  # another export may have written it in the meantime
            target.put_file(name, path)
            return {"written": target.uri(name), **facts}
        message = f"{selection.manifest.run}: selection {selection.manifest.selection_id}"
        changed = hub.push(dataset, {**documents, **entries, name: path}, message, public=public)
        return {"written": dataset.uri, "page": dataset.page, "unchanged": not changed, **facts}


def _describe(
    selection: Published, path: Path, dataset: hub.HubDataset | None, name: str, kinds: FieldType, notes: Notes
) -> Exported:
    selected_N = selection.table("scores.parquet", ["selected"])["selected"].to_numpy()
    origins = Origins(selection.plan())
    by_source = zip(origins.names.to_pylist(), origins.count_by_source(selected_N).tolist(), strict=True)
    folders = selection.manifest.spec.spec.candidates.uris
    sources = [SourceRows(uri, public_name(uri, folders), count) for uri, count in by_source if count]
    return Exported(
        path=name,
        page=dataset.page if dataset else None,
        url=dataset.url if dataset else None,
        digest=digest_of(path),
        num_rows=int(np.count_nonzero(selected_N)),
        columns=kinds,
        notes=notes.lines(),
        sources=sorted(sources, key=lambda source: -source.num_selected),
        manifest=selection.manifest,
    )


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def _refuse_existing(target: Store, name: str) -> None:
    if target.exists(name):
        fix = "remove it, or choose another name"
        raise RequestError("the file exists already", where=target.uri(name), fix=fix)


def _put_new(target: Store, name: str, path: Path) -> None:
    if not target.exists(name):
        target.put_file(name, path)
    elif target.get(name) != path.read_bytes():
        fix = "export to a folder of its own, or without --card"
        raise RequestError("a file with other content is there", where=target.uri(name), fix=fix)


def _full_uri(target: Store, name: str) -> str:
    path = target.local_path(name)
    return target.uri(name) if path is None else str(path.resolve())


def _put_entry(target: Store, name: str, path: Path) -> list[str]:
    """Notes on it: where it was written, or that it was not."""
    if not target.exists(name):
        target.put_file(name, path)
        return [f"written for {TRAINERS[name]}: {target.uri(name)}"]
    if target.get(name) == path.read_bytes():
        return []
    return [
        f"not changed: {target.uri(name)}; the entry of this file for {TRAINERS[name]} is {in_a_line(path.read_text('utf-8'))}"
    ]
