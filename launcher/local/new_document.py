"""The document that `prism init` writes: valid as it is, with the choices that most runs make next as comments."""

import json
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

TEMPLATE = """\
# A selection of PRISM. docs/selection.md describes every field.
apiVersion: prism.dev/v1alpha1
kind: SelectionRun
metadata: {{name: {name}}}
spec:
  model:
    uri: {model}
    # adapter: build/adapter      # a LoRA adapter, if one was trained on these data
    # dtype: float32              # the default, bfloat16, is slow on most CPUs
  candidates:
    uris: {candidates}
    # columns: {{user: question, assistant: answer}}   # where `prism inspect` does not know the layout
  targets:
    uris: {targets}
  store: prism/store              # gradients, shared by many runs; s3://BUCKET/PREFIX on a cluster
  output: prism/selections        # each selection in a folder of its own
  selection:
    keep: highest                 # what teaches the chosen responses; drop: lowest removes what teaches the rejected ones
    budget: {{fraction: 0.05}}      # or count: 1000, or tokens: 1000000
    # dedupe: near                # leaves out rows that teach nearly the same as a better one
  # scoring:
  #   preferenceModel: {{uri: MODEL}}   # where `model` was tuned on these data: the model before
  # evaluation: {{label: label}}    # a column that marks good rows: its AUROC in the report
"""


def new_document(name: str, model: str, candidates: Sequence[str], targets: Sequence[str]) -> str:
    """The document's text."""
    return TEMPLATE.format(
        name=name,
        model=json.dumps(model, ensure_ascii=False),
        candidates=json.dumps(list(candidates), ensure_ascii=False),
        targets=json.dumps(list(targets), ensure_ascii=False),
    )


def name_of(uri: str) -> str:
    """A valid metadata.name from the address of data: its last part, without the ending."""
    last = PurePosixPath(uri.split("://")[-1].split("?")[0].rstrip("/")).name
    return re.sub(r"[^a-z0-9]+", "-", last.split(".")[0].lower()).strip("-")[:40].strip("-") or "selection"
