"""A forward pass on the meta device under a counter: what a text costs, whatever the architecture.

Tensors on the meta device have shapes and no data, so a pass takes seconds and no memory. Does not know prices or settings.

Shapes: N tokens, K experts a token, S = N·K routed rows, H hidden dims.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prism_job.errors import RequestError
from prism_job.extract.load.model_config import short

LENGTH = 64
"""Tokens of the shorter text, at least: the chunk of the linear attentions that name none in their config."""

NAME = "prism-count"
"""Under which `_attention` and `_experts` stand in transformers' interfaces."""


@dataclass(frozen=True)
class Growth:
    """per_token · t + per_square · t² for a text of t tokens."""

    per_token: float
    per_square: float


@dataclass(frozen=True)
class TextCosts:
    """What the forward pass of one text of t tokens takes, without the head. Parameters go by their id.

    `rows`: rows a token that a parameter is multiplied with, 0 if none: 1, or the calls of a weight that is used several
    times, or for fused experts the number that run. `num_experts`: of fused experts. `called`: modules that a text enters.
    `products`: FLOPs of products of two activations, as in attention. `kept`: bytes that autograd keeps for the backward
    pass.
    """

    rows: dict[int, float]
    num_experts: dict[int, int]
    called: set[nn.Module]
    products: Growth
    kept: Growth


def text_costs(model: Any, *, eager: bool) -> TextCosts:
    """Count two texts, the second twice as long.

    Args:
        model: on the meta device, frozen, in evaluation mode.
        eager: attention keeps its probabilities; else it is one kernel.

    Raises RequestError: the costs of this model depend on the numbers in its tensors.
    """
    length = max(LENGTH, 4 * _chunk_size(model))
    groups = equal_blocks(model)
    try:
        try:
            first, second = (count_text(model, tokens, eager, groups) for tokens in (length, 2 * length))
        except Exception:  # blocks that pass more to each other than what they return
            first, second = (count_text(model, tokens, eager, []) for tokens in (length, 2 * length))
    except Exception as error:  # a meta tensor without data raises many kinds
        what = f"the cost of a {type(model).__name__} cannot be counted without its weights: {short(error)}"
        fix = "run the extraction on a few examples (prism run with a small pool) and measure it"
        raise RequestError(what, where="spec.model.uri", fix=fix) from error
    return TextCosts(
        rows={key: count / length for key, count in first.rows.items()},
        num_experts=first.num_experts,
        called=first.called,
        products=_growth(first.product_flops, second.product_flops, length),
        kept=_growth(first.kept_bytes, second.kept_bytes, length),
    )


def _chunk_size(model: nn.Module) -> int:
    """Of a state-space model. It computes whole chunks and one more, so the lengths counted are several whole chunks."""
    settings = cast(Any, model).config.get_text_config().to_dict()
    sizes = [value for name, value in settings.items() if name.endswith("chunk_size") and "attention" not in name]
    return max((size for size in sizes if isinstance(size, int)), default=0)


def _growth(first: float, second: float, length: int) -> Growth:
    per_square = max(0.0, (second - 2 * first) / (2 * length**2))
    return Growth(second / (2 * length) - per_square * 2 * length, per_square)


@dataclass
class _Count:
    weights: dict[int, nn.Parameter]  # id of a storage -> the parameter that is in it, or of which it is a copy
    head: nn.Parameter
    rows: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    num_experts: dict[int, int] = field(default_factory=dict)
    called: set[nn.Module] = field(default_factory=set)
    product_flops: float = 0
    kept_bytes: float = 0
    kept: dict[int, Tensor] = field(default_factory=dict)  # held, as copies are, so that no id of a storage comes twice
    copies: list[Tensor] = field(default_factory=list)

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights and storage._cdata not in self.kept:
            self.kept[storage._cdata] = tensor
            self.kept_bytes += storage.nbytes()
        return tensor

    def copied(self, source: Tensor, copy: Tensor) -> None:
        if (weight := self.weights.get(source.untyped_storage()._cdata)) is not None:
            self.weights[copy.untyped_storage()._cdata] = weight
            self.copies.append(copy)

    def add(self, tensors: list[Tensor], flops: float) -> None:
        """One product: with a weight, or of two activations."""
        used = [self.weights.get(tensor.untyped_storage()._cdata) for tensor in tensors]
        weight = max((each for each in used if each is not None), key=torch.numel, default=None)  # not its bias
        if weight is None:
            self.product_flops += flops
        elif weight is not self.head:
            self.rows[id(weight)] += flops / 2 / (weight.numel() / self.num_experts.get(id(weight), 1))


class _Operations(TorchDispatchMode):
    """Passes each operation on; those for which torch has a FLOP formula are counted."""

    def __init__(self, count: _Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1  # a check of the inputs, such as whether a mask hides anything; the data would say yes as well
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            self.count.copied(args[0], out)  # routers multiply with a float32 copy of their weight
        if formula := flop_registry.get(function.overloadpacket):
            tensors = [argument for argument in args if isinstance(argument, Tensor)]
            self.count.add(tensors, formula(*args, **(kwargs or {}), out_val=out))
        return out


def count_text(model: Any, tokens: int, eager: bool, groups: list[list[Any]]) -> _Count:
    """One text of so many tokens. `groups`: of equal blocks, of which the first alone is computed."""
    head = model.get_output_embeddings()
    weights = {parameter.untyped_storage()._cdata: parameter for parameter in model.parameters()}
    count = _Count(weights, head.weight)

    def from_embedding(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    def last_token(module: nn.Module, inputs: Any) -> Any:
        return (inputs[0][:, -1:], *inputs[1:])

    handles = [
        model.get_input_embeddings().register_forward_hook(from_embedding),
        head.register_forward_pre_hook(last_token),
        *(module.register_forward_pre_hook(lambda it, _: count.called.add(it)) for module in model.modules()),
    ]
    copies = [(block, group[0]) for group in groups for block in group[1:]]
    blocks = {first: _Block(count, first) for _, first in copies}
    try:
        for first, block in blocks.items():
            first.forward = block
        for other, first in copies:
            other.forward = partial(blocks[first].repeat, other)
        keeping = torch.autograd.graph.saved_tensors_hooks(count.keep, lambda it: it)
        with _counted_by(count, model, eager), _Operations(count), keeping:
            model(input_ids=torch.zeros(1, tokens, dtype=torch.long, device="meta"), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for module in {each for pair in copies for each in pair}:
            vars(module).pop("forward", None)  # an error above may have come before it was set
    return count


def equal_blocks(model: nn.Module) -> list[list[nn.Module]]:
    """Blocks of a stack that have the same modules, shapes and settings, and so the same costs; in groups of two or more."""
    groups: dict[Any, list[nn.Module]] = {}
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList):
            for block in dict.fromkeys(stack):
                groups.setdefault((stack, _structure(block)), []).append(block)
    return [group for group in groups.values() if len(group) > 1]


def _structure(block: nn.Module) -> Any:
    return tuple(
        (
            name,
            type(module),
            tuple((each, weight.shape) for each, weight in module.named_parameters(recurse=False)),
            tuple(
                (key, it) for key, it in vars(module).items() if isinstance(it, int | float | str) and "idx" not in key
            ),
        )
        for name, module in block.named_modules()
    )


class _Block:
    """The forward pass of a block, and its repetition for the blocks that equal it."""

    def __init__(self, count: _Count, block: Any) -> None:
        self.count, self.block, self.run = count, block, block.forward

    def __call__(self, *arguments: Any, **kwargs: Any) -> Any:
        count, before = self.count, dict(self.count.rows)
        flops, kept = count.product_flops, count.kept_bytes
        self.output = self.run(*arguments, **kwargs)
        self.rows = {key: rows - before.get(key, 0) for key, rows in count.rows.items()}
        self.flops, self.kept = count.product_flops - flops, count.kept_bytes - kept
        return self.output

    def repeat(self, other: nn.Module, *arguments: Any, **kwargs: Any) -> Any:
        """Add what `other` would have taken, parameter by parameter, and return what it would have returned: shapes."""
        count = self.count
        for mine, its in zip(self.block.parameters(), other.parameters(), strict=True):
            if rows := self.rows.get(id(mine)):
                count.rows[id(its)] += rows
            if id(mine) in count.num_experts:
                count.num_experts[id(its)] = count.num_experts[id(mine)]
        count.called.update(
            its for mine, its in zip(self.block.modules(), other.modules(), strict=True) if mine in count.called
        )
        count.product_flops += self.flops
        count.kept_bytes += self.kept
        return self.output


_counts: list[_Count] = []
"""That of the pass that runs."""


@contextmanager
def _counted_by(count: _Count, model: nn.Module, eager: bool) -> Iterator[None]:
    """`_experts` and `_attention` stand in for what has no kernel for meta tensors, while this is entered."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    settings = {"_attn_implementation_internal": "eager" if eager else NAME, "_experts_implementation_internal": NAME}
    before = [
        (config, name, getattr(config, name))
        for config in configs.values()
        for name in settings
        if hasattr(config, name)
    ]
    _counts.append(count)
    try:
        for config, name, _ in before:
            setattr(config, name, settings[name])
        yield
    finally:
        _counts.pop()
        for config, name, value in before:
            setattr(config, name, value)


class _Attention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: its inputs and its output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """[B, T, heads, dims of a value], of queries and keys [B, heads, T, dims]."""
    (count,) = _counts
    count.product_flops += 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None


def _experts(experts: Any, hidden_NH: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
    """One expert's weights for all routed rows: sizes, and so costs, are those of the experts that run."""
    (count,) = _counts
    rows_SH = hidden_NH.repeat_interleave(expert_NK.shape[1], dim=0)
    matrices = []
    for name in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj"):
        parameter = getattr(experts, name)
        count.num_experts[id(parameter)] = len(parameter)
        matrices.append(parameter[0] if experts.is_transposed else parameter[0].T)
    up, down = matrices
    inner = rows_SH @ up
    out_SH = (experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)) @ down
    if getattr(experts, "has_post_expert_norm", False):
        out_SH = experts.post_expert_norm(out_SH)
    weighted_SH = out_SH * weight_NK.reshape(-1, 1)
    return weighted_SH.view(*expert_NK.shape, -1).sum(1).to(hidden_NH.dtype)


ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, eager_mask)
