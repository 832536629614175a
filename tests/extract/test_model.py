"""Loading a model changes none of its numbers: types of weights and buffers are those that transformers gives it."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from prism_job.extract.load.model import load_model, load_tokenizer
from prism_job.spec.model import ModelSpec
from tests.conftest import Job
from tests.models import save_tiny_adapter, save_tiny_gguf, save_tiny_model


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_buffers_keep_the_type_that_transformers_gives_them(tiny_model: Path, dtype: str) -> None:
    # RoPE's frequencies in bfloat16 turn position 2,000 by almost half a circle.
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=getattr(torch, dtype))
    found = load_model(ModelSpec.model_validate({"uri": str(tiny_model), "dtype": dtype}), torch.device("cpu"))
    assert {parameter.dtype for parameter in found.parameters()} == {getattr(torch, dtype)}
    buffers = dict(plain.named_buffers())
    assert buffers
    for name, buffer in found.named_buffers():
        assert buffer.dtype == buffers[name].dtype
        assert torch.equal(buffer, buffers[name]), name


def test_an_adapters_weights_take_the_models_type(tiny_model: Path, tmp_path: Path) -> None:
    adapter = str(save_tiny_adapter(tmp_path / "adapter"))
    spec = ModelSpec.model_validate({"uri": str(tiny_model), "adapter": adapter, "dtype": "bfloat16"})
    found = load_model(spec, torch.device("cpu"))
    assert {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}
    assert any(".lora_" in name for name, _ in found.named_parameters())


def test_dropout_is_off_in_a_loaded_model(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "gpt2", "gpt2")
    config = json.loads((folder / "config.json").read_text())
    assert config["resid_pdrop"] == config["attn_pdrop"] == config["embd_pdrop"] == 0.1
    found = load_model(ModelSpec.model_validate({"uri": str(folder), "dtype": "float32"}), torch.device("cpu"))
    assert not any(module.training for module in found.modules())
    ids_BT = torch.arange(20)[None]
    assert torch.equal(found(input_ids=ids_BT).logits, found(input_ids=ids_BT).logits)


def test_a_gguf_file_is_the_model_that_was_written_into_it(tiny_model: Path, job: Job) -> None:
    """Weights, tokens and template: the run over the file scores as the run over the folder does."""
    path = save_tiny_gguf(job.folder / "tiny.gguf")
    specs = [ModelSpec.model_validate({"uri": str(uri), "dtype": "float32"}) for uri in (tiny_model, path)]
    its_own = gguf.get_tensor_name_map
    wanted, found = (load_model(spec, torch.device("cpu")).state_dict() for spec in specs)
    assert gguf.get_tensor_name_map is its_own, "what loading borrows is given back"
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name
    plain, read = (load_tokenizer(spec) for spec in specs)
    text = "<|im_start|>user\nCapital of 七?<|im_end|>\n Paris, 1 2  3"
    assert read(text, add_special_tokens=False)["input_ids"] == plain(text, add_special_tokens=False)["input_ids"]
    assert (read.eos_token_id, read.pad_token_id) == (plain.eos_token_id, plain.pad_token_id)

    tables = []
    for uri in (tiny_model, path):
        job.spec["model"]["uri"] = str(uri)
        tables.append(pq.read_table(job.run().parent / "scores.parquet").to_pydict())
    # The same weights through the same code: the same bits.
    assert tables[1] == tables[0]
    save_tiny_gguf(path, seed=1)
    words = job.plan()
    assert words["missing"] == words["units"], "another file under the same name reads no old shard"
