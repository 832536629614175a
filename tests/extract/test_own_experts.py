"""Experts outside transformers' interface: replaced while a pass is captured, and only then. Their rows: tests/benchmarks."""

from __future__ import annotations

import pytest
import torch

from benchmarks.models.tiny_architectures import VOCAB, build
from prism_job.extract.capture.gradients import capturing
from prism_job.extract.capture.layers import captured_layers, is_own_experts
from prism_job.extract.capture.row_format import Projections, RowFormat
from prism_job.extract.capture.sketches import PassSketches
from prism_job.extract.tokenise import Encoded, collate

CPU = torch.device("cpu")


@pytest.mark.parametrize("model_type", ["llama4_text", "longcat_flash"])
def test_capture_changes_no_logit_and_leaves_the_modules_as_they_were(model_type: str) -> None:
    model, _ = build(model_type)
    modules = [module for module in model.modules() if is_own_experts(module)]
    before = [set(vars(module)) for module in modules]
    batch = collate([Encoded(list(range(5, 5 + length)), [True] * length) for length in (9, 4)], CPU)
    assert int(batch.ids_BT.max()) < VOCAB
    plain = model(input_ids=batch.ids_BT, use_cache=False).logits
    layers = captured_layers(model, ("*",))
    projections = Projections(RowFormat(dim=4, seed=0, fold_dims=None), layers, torch.float32, CPU)
    embedded = model.get_input_embeddings()(batch.ids_BT).detach().requires_grad_()
    with capturing(layers, PassSketches(batch, [projections], with_factors=False)):
        assert all("forward" in vars(module) for module in modules)
        captured = model(inputs_embeds=embedded, use_cache=False).logits
    # float32: sums in another order, 6e-8 an operation
    torch.testing.assert_close(captured, plain, rtol=1e-4, atol=1e-5)
    assert [set(vars(module)) for module in modules] == before
    assert torch.equal(model(input_ids=batch.ids_BT, use_cache=False).logits, plain)
