"""The tokens of a micro-batch that a run has chosen (`extraction.tokensPerBatch: auto`), one object beside its plan for each
kind of hardware.

`extract/batch_size.py` measures it; the document that replays the run repeats it. Does not import torch.
"""

import contextlib

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prism_job.errors import DataError
from prism_job.spec.digest import digest
from prism_job.spec.document import SelectionRun
from prism_job.storage.address import open_store


class Setting(BaseModel):
    """What the best size depends on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    extractor: str  # covers the model, its dtype, the layers and the projection
    device: str
    ranks: int  # that share the weights
    offload: str


class _Chosen(Setting):
    tokens_per_batch: int = Field(ge=1)


def read_batch_size(run: SelectionRun, setting: Setting) -> int | None:
    """What this run chose before. Raises DataError: the object is damaged."""
    key = _key(run, setting)
    return _read(run, key).tokens_per_batch if open_store(run.spec.output).exists(key) else None


def write_batch_size(run: SelectionRun, setting: Setting, tokens_per_batch: int) -> None:
    chosen = _Chosen(**setting.model_dump(), tokens_per_batch=tokens_per_batch)
    open_store(run.spec.output).put(_key(run, setting), chosen.model_dump_json(indent=1).encode())


def batch_sizes(run: SelectionRun, extractor: str) -> set[int]:
    """All that this run chose for this extractor. Without what cannot be read: no row depends on it."""
    chosen: list[_Chosen] = []
    for listed in open_store(run.spec.output).list(_prefix(run)):
        with contextlib.suppress(DataError):
            chosen.append(_read(run, listed.key))
    return {each.tokens_per_batch for each in chosen if each.extractor == extractor}


def _read(run: SelectionRun, key: str) -> _Chosen:
    output = open_store(run.spec.output)
    try:
        return _Chosen.model_validate_json(output.get(key))
    except ValidationError as error:
        fix = "delete that object: the next extraction measures again"
        raise DataError(f"damaged batch size: {error}", where=output.uri(key), fix=fix) from error


def _key(run: SelectionRun, setting: Setting) -> str:
    return f"{_prefix(run)}{digest(setting.model_dump())[:16]}.json"


def _prefix(run: SelectionRun) -> str:
    return f"{run.metadata.name}/batch-"
