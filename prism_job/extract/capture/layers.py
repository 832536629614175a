"""Which layers of a model are captured, and their shapes. Does not compute gradients."""

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers.pytorch_utils import Conv1D

from prism_job.errors import RequestError
from prism_job.progress import event

LinearLayer = nn.Linear | Conv1D
"""Conv1D is GPT-2's linear layer with a transposed weight."""

COVERAGE_FLOOR = 0.9
"""Share of the requested matrix parameters that capture must reach; less means a layer type that cannot be captured."""


@dataclass(frozen=True)
class Layers:
    """The layers whose weight gradients are projected, in model order, and their share of the requested matrix parameters."""

    modules: dict[str, nn.Module]
    coverage: float

    @property
    def names(self) -> list[str]:
        return list(self.modules)


def captured_layers(model: nn.Module, globs: tuple[str, ...]) -> Layers:
    """The linear layers that the globs match, without embeddings and head; of an adapted model only the adapter's.

    Raises RequestError: no head, a glob that matches no layer, or under COVERAGE_FLOOR of the requested matrix parameters.
    """
    head = cast(Any, model).get_output_embeddings()
    embedding = cast(Any, model).get_input_embeddings()
    if head is None or embedding is None:
        what = f"{type(model).__name__} has no {'head' if head is None else 'input embedding'}: it is no language model"
        raise RequestError(what, where="spec.model.uri", fix="name a causal language model")
    is_adapted = any(".lora_" in name for name, _ in model.named_parameters())

    def is_requested(name: str) -> bool:
        return (".lora_" in name or not is_adapted) and any(fnmatch.fnmatchcase(name, glob) for glob in globs)

    linear = {name: module for name, module in model.named_modules() if isinstance(module, LinearLayer)}
    modules = {name: module for name, module in linear.items() if module is not head and is_requested(name)}
    for glob in globs:
        if not any(fnmatch.fnmatchcase(name, glob) for name in modules):
            what = f"'{glob}' matches no linear layer that can be captured"
            fix = f"layers of this model are named like {', '.join([*linear][:4])}"
            raise RequestError(what, where="spec.extraction.layers", fix=fix)
    captured = {id(module.weight) for module in modules.values()}
    requested = [
        (name, parameter, size)
        for name, parameter, size in _matrices(model, head, embedding)
        if is_requested(name.rpartition(".")[0])
    ]
    missed = [(name, size) for name, parameter, size in requested if id(parameter) not in captured]
    total, unseen = sum(size for *_, size in requested), [name for name, _ in missed]
    coverage = 1 - sum(size for _, size in missed) / total
    event("layers", captured=len(modules), coverage=round(coverage, 4), parameters=total, unseen=unseen[:8])
    if coverage < COVERAGE_FLOOR:
        what = f"capture covers {coverage:.1%} of the matrix parameters, under {COVERAGE_FLOOR:.0%}"
        what += f"; not captured: {unseen[0]} (only linear layers can be captured, not fused experts)"
        fix = "list the layers you accept in extraction.layers"
        raise RequestError(what, where="spec.extraction.layers", fix=fix)
    return Layers(cast(dict[str, nn.Module], modules), coverage)


def layer_dims(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    linear = cast(nn.Linear, module)
    return linear.in_features, linear.out_features


def _matrices(model: nn.Module, head: nn.Module, embedding: nn.Module) -> Iterator[tuple[str, nn.Parameter, int]]:
    """(name, parameter, number of elements) of every matrix but those of head and embeddings."""
    excluded = {id(parameter) for module in (head, embedding) for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        is_embedding = "embed" in name or name.rpartition(".")[0].rpartition(".")[2] in ("wpe", "wte")
        # ZeRO-3 leaves empty tensors behind; ds_numel and ds_shape hold what the parameter really is.
        num_axes = len(getattr(parameter, "ds_shape", parameter.shape))
        if num_axes > 1 and not is_embedding and id(parameter) not in excluded:
            yield name, parameter, int(getattr(parameter, "ds_numel", parameter.numel()))
