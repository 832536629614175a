"""The data card of an export: README.md of a data set on the Hugging Face hub.

States only what the selection knows: no licence, no language, no task.
"""

import re
from collections.abc import Sequence
from typing import Any

import yaml

from prism_job.publish.export.exported import Exported, hub_datasets, model_of, public_name
from prism_job.publish.export.notes import shown_names

SIZES = {
    10**3: "n<1K",
    10**4: "1K<n<10K",
    10**5: "10K<n<100K",
    10**6: "100K<n<1M",
    10**7: "1M<n<10M",
    10**8: "10M<n<100M",
}
"""Number of rows that is too many -> the hub's name of the size."""

LARGER = "100M<n<1B"

MAX_SOURCES = 50


def data_card(exported: Exported) -> str:
    """The whole README.md."""
    return f"---\n{yaml.safe_dump(_metadata(exported), sort_keys=False, allow_unicode=True)}---\n\n{_text(exported)}"


def _metadata(exported: Exported) -> dict[str, Any]:
    sources = list(dict.fromkeys(base.repo for base in hub_datasets(exported.sources)))
    return {
        "pretty_name": exported.manifest.run,
        "size_categories": [next((name for limit, name in SIZES.items() if exported.num_rows < limit), LARGER)],
        **({"source_datasets": sources} if sources else {}),
        "tags": ["prism", "data-selection"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": exported.path}]}],
    }


def _text(exported: Exported) -> str:
    manifest = exported.manifest
    spec, counts = manifest.spec.spec, manifest.counts
    rule = spec.selection.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    targets = [public_name(uri) for uri in spec.targets.all_uris()]
    facts = {
        "Selection": f"{manifest.selection_id} of run {manifest.run}",
        "Rule": yaml.safe_dump(rule, default_flow_style=True, sort_keys=False, width=1000).strip(),
        "Candidates": f"{counts.candidates:,} ({counts.quarantined:,} unusable, {counts.duplicates:,} duplicates)",
        "Targets": f"{counts.target_pairs:,} pairs: {shown_names(targets)}",
        "Model": model_of(manifest),
        "PRISM": manifest.code_version,
    }
    columns = [(name, str(kind)) for name, kind in exported.columns.keys.items()]
    shown = exported.sources[:MAX_SOURCES]
    sources = [(source.name, f"{source.num_selected:,}") for source in shown]
    if len(exported.sources) > len(shown):
        others = exported.sources[MAX_SOURCES:]
        sources.append((f"{len(others):,} more", f"{sum(source.num_selected for source in others):,}"))
    file = (exported.path, f"{exported.num_rows:,}", f"{exported.digest.bytes:,}", exported.digest.sha256)
    notes = "".join(f"- {_inline(note)}\n" for note in exported.notes)
    return "\n".join(
        [
            f"# {manifest.run}\n",
            f"{counts.selected:,} of {counts.candidates:,} candidate examples, selected by PRISM (arXiv 2605.21422): by",
            "how much training the model on an example raises its preference for the targets' chosen responses.\n",
            "## Data\n",
            _table(("file", "rows", "bytes", "SHA-256"), [file]),
            _table(("column", "type"), columns),
            *([notes] if notes else []),
            "## Provenance\n",
            _table(("", ""), list(facts.items())),
            _table(("source", "rows selected"), sources),
            "## Licence\n",
            "Not stated here: the rows keep the licences of their sources.\n",
        ]
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(map(_inline, line))} |\n" for line in lines)


def _inline(text: str) -> str:
    # A column's name or a path may hold anything; in a cell it must stay one line, one cell and no markup.
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    return re.sub(r"([\\|<`\[\]*])", r"\\\1", text)
