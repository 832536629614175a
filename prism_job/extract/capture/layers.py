"""Which weights of a model are captured, their shapes, and their share of the model. Does not compute gradients."""

import fnmatch
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prism_job.errors import RequestError
from prism_job.extract.load.quantised import logical_shape
from prism_job.progress import event

LinearLayer = nn.Linear | Conv1D
"""Conv1D is GPT-2's linear layer with a transposed weight."""

_TOWER = re.compile("vision|visual|image|audio")
"""Names of modules beside the text model, of a config without a part for the text model."""

OWN_EXPERTS = {"Llama4TextExperts": True, "LongcatFlashExperts": False}
"""Fused experts outside transformers' interface, by class: whether their matrices stand as [inputs, outputs]."""

COVERAGE_FLOOR = 0.9
"""Share of the requested matrix parameters that capture must reach; less means a layer type that cannot be captured."""


@dataclass(frozen=True)
class CapturedWeight:
    """One parameter whose gradient is projected: a matrix, or the matrices of all experts of a layer.

    `modules`: all that use it, for some models share a weight. `num_experts`: 0 for a plain matrix.
    """

    modules: tuple[nn.Module, ...]
    attribute: str  # the parameter's name in these modules
    inputs: int
    outputs: int
    num_experts: int = 0

    @property
    def numel(self) -> int:
        return self.inputs * self.outputs * max(1, self.num_experts)

    @property
    def parameter(self) -> nn.Parameter:
        return cast(nn.Parameter, getattr(self.modules[0], self.attribute))


@dataclass(frozen=True)
class Layers:
    """The captured weights, in model order, by the name of the module, or for experts of the parameter.

    `num_requested`: matrix parameters that the globs ask for. `num_matrices`: all matrix parameters of the text model but
    embeddings and head; of an adapted model, the adapter's. `unseen`: requested and not captured, by size.
    """

    weights: dict[str, CapturedWeight]
    num_requested: int
    num_matrices: int
    unseen: dict[str, int]
    left_out: tuple[str, ...] = ()  # top modules that a text does not pass through: vision and audio towers

    @property
    def names(self) -> list[str]:
        return list(self.weights)

    @property
    def coverage(self) -> float:
        """Share of the requested matrix parameters."""
        return 1 - sum(self.unseen.values()) / self.num_requested

    @property
    def share_of_model(self) -> float:
        """Share of all matrix parameters that the model trains."""
        return sum(weight.numel for weight in self.weights.values()) / self.num_matrices

    @property
    def notes(self) -> dict[str, Any]:
        """What a shard of targets says of them: their names, and the shares to four digits."""
        return {
            "layers": self.names,
            "coverage": round(self.coverage, 4),
            "share_of_model": round(self.share_of_model, 4),
        }

    def without(self, reasons: dict[str, str]) -> Self:
        """Without these weights, which count as unseen.

        Args:
            reasons: why each cannot be captured.

        Raises RequestError: nothing is left, or under COVERAGE_FLOOR of what was requested.
        """
        kept = {name: weight for name, weight in self.weights.items() if name not in reasons}
        unseen = self.unseen | {name: self.weights[name].numel for name in reasons}
        layers = replace(self, weights=kept, unseen=unseen)
        layers.refuse_low_coverage(reasons)
        return layers

    def refuse_low_coverage(self, reasons: dict[str, str]) -> None:
        if self.weights and self.coverage >= COVERAGE_FLOOR:
            return
        largest = max(self.unseen, key=self.unseen.__getitem__)
        reason = reasons.get(largest, "only linear layers and experts of transformers' own interface can be captured")
        what = f"capture covers {self.coverage:.1%} of the matrix parameters asked for, under {COVERAGE_FLOOR:.0%}; "
        what += f"not captured: {largest} ({reason})"
        fix = "list the layers you accept in extraction.layers, or leave these out with '!GLOB'"
        raise RequestError(what, where="spec.extraction.layers", fix=fix)


def captured_layers(model: nn.Module, globs: tuple[str, ...]) -> Layers:
    """The weights of linear layers, routers and experts that the globs match, without embeddings and head.

    Of an adapted model only the adapter's; of a multimodal one only the text model's. Whether a text passes through each
    of them is shown by `probe.used_layers` alone.

    Args:
        globs: over names; one that begins with "!" leaves out what it matches.

    Raises RequestError: no head, a glob that matches nothing, or under COVERAGE_FLOOR of the requested matrix parameters.
    """
    head = cast(Any, model).get_output_embeddings()
    embedding = cast(Any, model).get_input_embeddings()
    if head is None or embedding is None:
        what = f"{type(model).__name__} has no {'head' if head is None else 'input embedding'}: it is no language model"
        raise RequestError(what, where="spec.model.uri", fix="name a causal language model")
    is_adapted = any(".lora_" in name for name, _ in model.named_parameters())
    candidates = _candidates(model, head, embedding)
    towers = _towers(model, head)
    wanted = [glob for glob in globs if not glob.startswith("!")] or ["*"]
    unwanted = [glob[1:] for glob in globs if glob.startswith("!")]

    def is_trained(name: str) -> bool:
        is_beside = any(f"{name}.".startswith(f"{tower}.") for tower in towers)
        return (".lora_" in name or not is_adapted) and not is_beside

    def is_requested(name: str) -> bool:
        return is_trained(name) and _matches(name, wanted) and not _matches(name, unwanted)

    weights = {name: weight for name, weight in candidates.items() if is_requested(name)}
    for glob in globs:
        if not any(is_trained(name) and _matches(name, [glob.removeprefix("!")]) for name in candidates):
            what = f"'{glob}' matches no linear layer that can be captured"
            fix = f"layers of this model are named like {', '.join([*candidates][:4])}"
            raise RequestError(what, where="spec.extraction.layers", fix=fix)
    if not weights:
        what = "no weight that can be captured is left"
        raise RequestError(what, where="spec.extraction.layers", fix="leave out less, or name the layers you want")
    sizes = {id(weight.parameter): weight.numel for weight in candidates.values()}
    trained = {name: parameter for name, parameter in _matrices(model, head, embedding, sizes) if is_trained(name)}
    requested = {name: parameter for name, parameter in trained.items() if is_requested(name.removesuffix(".weight"))}

    def size(parameter: nn.Parameter) -> int:
        return sizes.get(id(parameter)) or math.prod(shape_of(parameter))

    captured = {id(weight.parameter) for weight in weights.values()}
    unseen = {name: size(parameter) for name, parameter in requested.items() if id(parameter) not in captured}
    num_requested, num_matrices = (sum(map(size, each.values())) for each in (requested, trained))
    layers = Layers(weights, num_requested, num_matrices, unseen, towers)
    layers.refuse_low_coverage({})
    return layers


def report(layers: Layers) -> None:
    """The event `layers`: what is captured, and what is not."""
    event(
        "layers",
        captured=len(layers.weights),
        coverage=round(layers.coverage, 4),
        share_of_model=round(layers.share_of_model, 4),
        parameters=layers.num_requested,
        unseen=[*layers.unseen][:8],
        left_out=list(layers.left_out),
    )


def layer_dims(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    linear = cast(nn.Linear, module)
    return linear.in_features, linear.out_features


def is_experts(module: nn.Module) -> bool:
    """Fused experts: of OWN_EXPERTS, or behind transformers' interface (`use_experts_implementation` wraps their forward)."""
    is_wrapped = hasattr(type(module).forward, "__wrapped__") and hasattr(module, "is_transposed")
    return (is_wrapped or is_own_experts(module)) and isinstance(getattr(module, "down_proj", None), nn.Parameter)


def is_own_experts(module: nn.Module) -> bool:
    return type(module).__name__ in OWN_EXPERTS


def _candidates(model: nn.Module, head: nn.Module, embedding: nn.Module) -> dict[str, CapturedWeight]:
    """Every weight that might be captured, each once, by its first name."""
    excluded = {id(parameter) for module in (head, embedding) for parameter in module.parameters()}
    names: dict[int, str] = {}  # id of a parameter -> its first name
    found: dict[str, CapturedWeight] = {}
    for module_name, module in model.named_modules():
        for name, weight in _weights_of(module_name, module):
            key = id(weight.parameter)
            if key in excluded or module is head:
                continue
            first = found.get(names.setdefault(key, name))
            found[names[key]] = weight if first is None else replace(first, modules=(*first.modules, module))
    return found


def _weights_of(name: str, module: nn.Module) -> Iterator[tuple[str, CapturedWeight]]:
    weight = getattr(module, "weight", None)
    if isinstance(module, LinearLayer):
        yield name, CapturedWeight((module,), "weight", *layer_dims(module))
    elif is_experts(module):
        is_transposed = OWN_EXPERTS.get(type(module).__name__, getattr(module, "is_transposed", False))
        for attribute in ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj"):
            shape = shape_of(getattr(module, attribute))
            inputs, outputs = shape[1:] if is_transposed else reversed(shape[1:])
            yield f"{name}.{attribute}", CapturedWeight((module,), attribute, inputs, outputs, shape[0])
    elif isinstance(weight, nn.Parameter) and len(shape_of(weight)) == 2 and not isinstance(module, nn.Embedding):
        # A router: its forward passes a bare matrix to torch's `linear`. What does something else with it gives no
        # gradient in the probe, and counts as unseen.
        outputs, inputs = shape_of(weight)
        yield name, CapturedWeight((module,), "weight", inputs, outputs)


def _matches(name: str, globs: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _towers(model: nn.Module, head: nn.Module) -> tuple[str, ...]:
    """The modules of a multimodal model that stand beside its text model, by their outermost names."""
    config = getattr(model, "config", None)
    if config is None:
        return ()
    if config.get_text_config() is config:
        if not (hasattr(config, "vision_config") or hasattr(config, "audio_config")):
            return ()
        towers = [name for name, _ in model.named_modules() if _TOWER.search(name.rpartition(".")[2])]
        return tuple(name for name in towers if not any(name.startswith(f"{outer}.") for outer in towers))
    decoder = cast(Any, model).get_decoder()
    path = next(name for name, module in model.named_modules() if module is decoder).split(".")
    beside: list[str] = []
    for depth, inside in enumerate(path):
        parent = ".".join(path[:depth])
        for name, child in model.get_submodule(parent).named_children():
            if name != inside and child is not head and any(True for _ in child.parameters()):
                beside.append(f"{parent}.{name}" if parent else name)
    return tuple(beside)


def _matrices(
    model: nn.Module, head: nn.Module, embedding: nn.Module, candidates: Collection[int]
) -> Iterator[tuple[str, nn.Parameter]]:
    """Every matrix but those of head and embeddings. `candidates`: ids of those that are no embeddings for certain."""
    excluded = {id(parameter) for module in (head, embedding) for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        is_embedding = "embed" in name or name.rpartition(".")[0].rpartition(".")[2] in ("wpe", "wte")
        is_bias = name.endswith("bias")  # of experts: a vector for each
        if id(parameter) in candidates or (
            len(shape_of(parameter)) > 1 and not is_embedding and not is_bias and id(parameter) not in excluded
        ):
            yield name, parameter


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """ZeRO-3 leaves empty tensors behind; ds_shape holds what the parameter really is. Quantised weights are packed."""
    return tuple(getattr(parameter, "ds_shape", logical_shape(parameter)))
