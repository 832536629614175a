"""The document that `prism init` writes: valid as it is, with the choices that most runs make next as comments."""

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

SMALL_BYTES = 4 * 2**20
"""Some thousand examples: read and tokenised in seconds."""

TEMPLATE = """\
# A selection of PRISM. docs/selection.md describes every field.
apiVersion: prism.dev/v1alpha1
kind: SelectionRun
metadata: {{name: {name}}}
spec:
  model:
    uri: {model}
    # adapter: build/adapter      # a LoRA adapter, if one was trained on these data
    {dtype}
  candidates:
    uris: {candidates}
    # columns: {{user: question, assistant: answer}}   # where `prism inspect` does not know the layout
  targets:
    uris: {targets}
  store: prism/store              # gradients, shared by many runs; s3://BUCKET/PREFIX on a cluster
  output: prism/selections        # each selection in a folder of its own
  selection:
    keep: highest                 # what teaches the chosen responses; drop: lowest removes what teaches the rejected ones
    budget: {{fraction: 0.05}}      # or count: 1000, or tokens: 1000000; how large: docs/choosing-targets.md
    # dedupe: near                # leaves out rows that teach nearly the same as a better one
  # scoring:
  #   preferenceModel: {{uri: MODEL}}   # where `model` was tuned on these data: the model before
  # evaluation: {{label: label}}    # a column that marks good rows: its AUROC in the report
"""


WITH_GPU = "# dtype: float32              # the default, bfloat16, is slow on most CPUs"
WITHOUT_GPU = (
    "dtype: float32                # no nvidia-smi is on PATH here; bfloat16, the default, is slow on most CPUs"
)


def new_document(
    name: str, model: str, candidates: Sequence[str], targets: Sequence[str], *, has_gpu: bool = True
) -> str:
    """The document's text."""
    return TEMPLATE.format(
        dtype=WITH_GPU if has_gpu else WITHOUT_GPU,
        name=name,
        model=json.dumps(model, ensure_ascii=False),
        candidates=json.dumps(list(candidates), ensure_ascii=False),
        targets=json.dumps(list(targets), ensure_ascii=False),
    )


def unusable_rows_advice(facts: dict[str, Any], role: str, max_bad_fraction: float, file: str) -> str | None:
    """What to do about the rows that `inspect` calls unusable before a run; None where the run leaves them out."""
    num_read, num_bad = (sum(source[name] for source in facts["sources"]) for name in ("rows_read", "rows_unusable"))
    if any(source["rows_of_pairs"] for source in facts["sources"]):
        return f"give the files of pairs as targets, not as {role}"
    if not num_bad or (role == "candidates" and num_bad <= max_bad_fraction * num_read):
        return None
    if num_bad == num_read:
        return f"name the columns of the {role} in {file} (docs/data.md)"
    correct = f"correct or remove {num_bad:,} of the {num_read:,} rows of the {role}"
    return correct if role == "targets" else f"{correct}, or raise candidates.maxBadFraction ({max_bad_fraction:g})"


def are_small(sources: Sequence[str]) -> bool:
    """Whether these are files on this disk of at most SMALL_BYTES together, all of whose rows are read in a moment."""
    size = 0
    for path in map(Path, sources):
        if not path.exists():
            return False
        for file in [path] if path.is_file() else filter(Path.is_file, path.rglob("*")):
            size += file.stat().st_size
            if size > SMALL_BYTES:
                return False
    return True


def name_of(uri: str) -> str:
    """A valid metadata.name from the address of data: its last part, without the ending."""
    last = PurePosixPath(uri.split("://")[-1].split("?")[0].rstrip("/")).name
    return re.sub(r"[^a-z0-9]+", "-", last.split(".")[0].lower()).strip("-")[:40].strip("-") or "selection"
