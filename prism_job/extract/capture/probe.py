"""Two tiny passes before the first unit: which of the weights a text passes through, and whether it gives one row a token.

Does not know data, units or row formats.

Shapes: B examples, T tokens, R rows an example, P projected dims.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prism_job.errors import RequestError, TransientError
from prism_job.extract.capture.forward_backward import forward_and_backward
from prism_job.extract.capture.gradients import capturing
from prism_job.extract.capture.layers import Layers
from prism_job.extract.capture.row_format import Projections, RowFormat
from prism_job.extract.capture.sketches import PassSketches
from prism_job.extract.passes import is_out_of_memory
from prism_job.extract.tokenise import Batch

_FORWARD_ERRORS = (AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError)
"""Raised by a model that needs more than token ids. Without RuntimeError: a lost rank and full memory raise that too."""

NUM_EXAMPLES, NUM_TOKENS, NUM_CHANGED = 3, 7, 2
"""Unequal, so that no layout of a layer's rows looks like another."""

MAX_LEAK = 0.2
"""Of the change of a layer's rows, the share that may fall on rows of tokens that did not change. Rounding in bfloat16 is
2^-9 of a row; a row of another token is off by all of its change."""


def used_layers(
    model: PreTrainedModel, layers: Layers, any_rank: Callable[..., Sequence[bool]] = lambda *flags: flags
) -> Layers:
    """The layers without those whose rows cannot be taken, which count as unseen. Collective under ZeRO-3.

    In the second pass the last tokens of one example are others: of a causal model only the rows of these tokens may
    change, so a layer that orders its rows in another way is found even where the sizes agree.

    Args:
        any_rank: for each flag, whether any rank has set it.

    Raises:
        RequestError: the model is not causal, or what is left covers less than `layers.COVERAGE_FLOOR`.
        TransientError: a pass of a few tokens does not fit into memory.
    """
    parameter = next(model.parameters())
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    projections = Projections(RowFormat(dim=8, seed=0, fold_dims=None), layers, dtype, parameter.device)
    try:
        batches = _two_batches(model, parameter.device)
        first, second = (_probe(model, layers, projections, ids_BT, dtype) for ids_BT in batches)
    except _FORWARD_ERRORS as error:
        what = f"a first pass through the model fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise RequestError(
            what, where=type(model).__name__, fix="use a causal model that transformers can train"
        ) from error
    reasons = first.reasons | second.reasons
    for name in layers.names:
        if name in reasons:
            continue
        if name not in first.finished:
            reasons[name] = "no gradient of a text reaches it by a call of its module"
        elif not all(map(_change_is_local, first.a_sides[name], second.a_sides[name])):
            reasons[name] = "its rows are not one a token, examples first"
    # The ranks of a world must capture the same weights: what one of them cannot take, none takes.
    flags = any_rank(*(name in reasons for name in layers.names))
    refused = [name for name, is_refused in zip(layers.names, flags, strict=True) if is_refused]
    return layers.without({name: reasons.get(name, "another rank cannot take its rows") for name in refused})


def _two_batches(model: PreTrainedModel, device: torch.device) -> tuple[Tensor, Tensor]:
    """[B, T] each: ids from all over the vocabulary; in the second some tokens have other embeddings than in the first.

    Ids that the config names, such as that of an image, stand for more than a token, and reserved ones share an embedding.
    """
    config = model.config.get_text_config()
    settings = [*vars(model.config).items(), *vars(config).items()]
    values = [value for name, value in settings if name.endswith(("_token_id", "_token_index"))]
    listed = [each for value in values for each in (value if isinstance(value, list) else [value])]
    named = {each for each in listed if isinstance(each, int)}
    spread = torch.linspace(0, config.vocab_size - 1, 8 * NUM_EXAMPLES * NUM_TOKENS).long().unique()
    ids = torch.tensor([each for each in spread.tolist() if each not in named] or spread.tolist(), device=device)
    with torch.no_grad():
        embedded_NE = cast(nn.Module, model.get_input_embeddings())(ids[None])[0].float()
    num_ids = NUM_EXAMPLES * NUM_TOKENS
    places_BT = torch.arange(num_ids, device=device).view(NUM_EXAMPLES, -1) * len(ids) // num_ids
    others_BT = places_BT.clone()
    for token in range(NUM_TOKENS - NUM_CHANGED, NUM_TOKENS):
        others_BT[1, token] = (embedded_NE - embedded_NE[places_BT[1, token]]).norm(dim=1).argmax()
    return ids[places_BT], ids[others_BT]


def _probe(
    model: PreTrainedModel, layers: Layers, projections: Projections, ids_BT: Tensor, dtype: torch.dtype
) -> "_Probe":
    supervised_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    supervised_BT[:, 0] = False
    probe = _Probe(Batch(ids_BT, torch.ones_like(supervised_BT), supervised_BT), [projections], with_factors=False)
    try:
        with capturing(layers, probe):
            forward_and_backward(model, probe.batch, dtype)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fix = "free memory, or give each rank a smaller share of the model (deepspeed.stage: 3, more ranks or nodes)"
        what = f"out of memory in a pass of {ids_BT.numel()} tokens"
        raise TransientError(what, where="extract", fix=fix) from error
    return probe


def _change_is_local(first_BRP: Tensor, second_BRP: Tensor) -> bool:
    """Whether no rows changed but those of the changed tokens. True of zeros: their gradient is zero too."""
    change_BR = (second_BRP - first_BRP).abs().double().sum(-1)
    num_rows = change_BR.shape[1] // NUM_TOKENS * NUM_CHANGED
    total, expected = float(change_BR.sum()), float(change_BR[1, -num_rows:].sum())
    return total != total or total - expected <= MAX_LEAK * total


class _Probe(PassSketches):
    """Keeps the projected inputs of every use; refuses nothing, but notes why."""

    def __init__(self, batch: Batch, projections: Sequence[Projections], *, with_factors: bool) -> None:
        super().__init__(batch, projections, with_factors=with_factors)
        self.reasons: dict[str, str] = {}
        self.a_sides: defaultdict[str, list[Tensor]] = defaultdict(list)

    def refuse(self, name: str, reason: str) -> None:
        self.reasons[name] = reason

    def add(self, name: str, a_sides: Sequence[Tensor], b_sides: Sequence[Tensor]) -> None:
        self.a_sides[name].append(a_sides[0])
        super().add(name, a_sides, b_sides)
