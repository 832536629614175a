"""Croissant of an export: the file, its checksum and its columns as JSON-LD (mlcommons.org/croissant, version 1.0).

States only what the selection knows. Does not read rows.
"""

import json
from typing import Any
from urllib.parse import quote

from prism_job.publish.export.exported import Exported, hub_datasets, model_of
from prism_job.publish.export.fields import FieldType
from prism_job.publish.export.notes import shown_names

Json = dict[str, Any]

CONTEXT: Json = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    **{name: f"cr:{name}" for name in ("citeAs", "column", "equivalentProperty", "extract", "field", "fileProperty")},
    **{
        name: f"cr:{name}"
        for name in ("fileObject", "fileSet", "format", "includes", "isLiveDataset", "jsonPath", "key")
    },
    **{name: f"cr:{name}" for name in ("md5", "parentField", "path", "recordSet", "references", "regex", "repeated")},
    **{name: f"cr:{name}" for name in ("replace", "samplingRate", "separator", "source", "subField", "transform")},
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
}
"""The standard context of version 1.0; a validator warns of any other."""

ENCODINGS = {".parquet": "application/x-parquet", ".zst": "application/zstd"}
"""Ending -> media type. All others are JSON lines; readers see by the content whether they are under gzip."""

DATA_TYPES = {"text": "sc:Text", "integer": "sc:Integer", "number": "sc:Float", "boolean": "sc:Boolean"}


def croissant(exported: Exported) -> str:
    """The whole croissant.json."""
    manifest, counts = exported.manifest, exported.manifest.counts
    fields, unknown = [], []
    for name, kind in exported.columns.keys.items():
        field = _column(name, kind, quote(exported.path))
        unknown += [] if field else [name]
        fields += [field] if field else []
    bases = [
        f"https://huggingface.co/datasets/{base.repo}/tree/{base.revision}" for base in hub_datasets(exported.sources)
    ]
    document = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": manifest.run,
        "description": f"{counts.selected} of {counts.candidates} candidate examples, selected by PRISM (arXiv 2605.21422) "
        f"with {model_of(manifest)} and {counts.target_pairs} target pairs. Selection {manifest.selection_id}.",
        "keywords": ["prism", "data-selection"],
        **({"url": exported.page} if exported.page else {}),
        **({"isBasedOn": bases} if bases else {}),
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": quote(exported.path),
                "name": exported.path,
                "contentUrl": exported.url or quote(exported.path),
                "contentSize": f"{exported.digest.bytes} B",
                "encodingFormat": _encoding(exported.path),
                "sha256": exported.digest.sha256,
            }
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "default",
                "name": "default",
                "description": f"{exported.num_rows} examples."
                + (
                    f" Columns of mixed or unknown types, not described: {shown_names(list(map(repr, unknown)))}."
                    if unknown
                    else ""
                ),
                "field": fields,
            }
        ],
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _encoding(path: str) -> str:
    return next((kind for ending, kind in ENCODINGS.items() if path.endswith(ending)), "application/jsonlines")


def _column(name: str, kind: FieldType, file: str) -> Json | None:
    """The field of a column. None where Croissant cannot hold it: mixed types, lists of lists, nothing but null, no name."""
    item = kind if kind.items is None else kind.items
    if not name or (kind.items is not None and (kind.scalars or kind.keys)):
        return None
    repeated = {} if kind.items is None else {"repeated": True}
    field = {
        "@type": "cr:Field",
        "@id": f"default/{quote(name, safe='', errors='backslashreplace')}",
        "name": name,
        **repeated,
    }
    source = {"fileObject": {"@id": file}, "extract": {"column": name}}
    if item.scalar:
        return field | {"dataType": DATA_TYPES[item.scalar], "source": source}
    if item.scalars or item.items is not None:
        return None
    parts = [
        {
            "@type": "cr:Field",
            "@id": f"{field['@id']}/{key}",
            "name": key,
            "dataType": DATA_TYPES[part.scalar],
            "source": source | {"transform": {"jsonPath": key}},
        }
        for key, part in item.keys.items()
        if part.scalar and key.isidentifier()
    ]
    return field | {"subField": parts} if parts else None
