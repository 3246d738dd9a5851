# SPDX-License-Identifier: Apache-2.0
"""The dequantized folder loads in transformers with exactly the weights given."""

from __future__ import annotations

import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_compile.artifact.dequantized import dequantized_weights, write_dequantized
from gptq_compile.errors import OutputError
from gptq_compile.frontend.source import load_source
from gptq_compile.frontend.trace import trace
from gptq_compile.passes.lower_precision import LowerPrecision
from gptq_compile.passes.manager import PassManager
from gptq_compile.passes.pipeline import trace_passes


def reload(folder, dtype=torch.float32):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize(
    ("model_type", "name", "config"),
    [
        ("llama", "model.layers.1.mlp.down_proj.weight", {}),
        ("llama", "model.layers.0.self_attn.q_proj.weight", {"tie_word_embeddings": True}),
        ("gpt2", "transformer.h.0.mlp.c_fc.weight", {}),
        ("mixtral", "model.layers.0.mlp.experts.down_proj", {}),
    ],
    ids=["llama", "tied", "gpt2", "mixtral"],
)
def test_reloaded_model_computes_with_the_overrides(tmp_path, save_model, model_type, name, config):
    model = save_model(tmp_path / "in", model_type, **config)
    rounded = (model.get_parameter(name) * 8).round() / 8
    source = load_source(str(tmp_path / "in"))
    out = write_dequantized(source, {name: rounded}, tmp_path / "out")
    with torch.no_grad():
        model.get_parameter(name).copy_(rounded)
        ids = torch.arange(12)[None]
        again = reload(out)
        for key, value in model.named_parameters(remove_duplicate=False):
            assert torch.equal(again.get_parameter(key), value), key
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert os.path.exists(out / "tokenizer.json")
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"] == source.tokenizer("abc")["input_ids"]
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("model_type", "config"), [("llama", {"tie_word_embeddings": True}), ("gpt2", {}), ("mixtral", {})]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_half_precision_stores_is_what_the_folder_has(tmp_path, save_model, model_type, config, dtype):
    """A program in half precision multiplies by rounded matrices and adds rounded biases; norms are not rounded."""
    model = save_model(tmp_path / "in", model_type, **config)
    source = load_source(str(tmp_path / "in"))
    program = trace(source.config, source.params, name=source.name)
    PassManager(trace_passes(), validate=False).run(program)
    made = {name: make() for name, make in dequantized_weights(program, dtype).items()}
    assert not dequantized_weights(program)
    again = reload(write_dequantized(source, made, tmp_path / "out"))
    PassManager([LowerPrecision(dtype)], validate=False).run(program)
    params = program.params
    stored = {params.canonical(n).removesuffix(".T"): params.dtype(n) for n in program.param_nodes}
    assert dtype in stored.values() and torch.float32 in stored.values()
    for name, value in model.named_parameters():
        is_half = stored[name] == dtype
        assert torch.equal(again.get_parameter(name), value.to(dtype).float() if is_half else value), name
        assert is_half == (name in made)


def test_shards_and_half_precision(tmp_path, save_model):
    model = save_model(tmp_path / "in")
    out = write_dequantized(
        load_source(str(tmp_path / "in")), {}, tmp_path / "out", dtype=torch.float16, shard_bytes=9_000
    )
    shards = sorted(out.glob("model-*-of-*.safetensors"))
    assert len(shards) > 3 and not (out / "model.safetensors").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {s.name for s in shards}
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    again = reload(out, torch.float16)
    for key, value in model.named_parameters():
        assert torch.equal(again.get_parameter(key), value.half()), key
    assert load_source(str(out)).parameter_count == load_source(str(tmp_path / "in")).parameter_count


def test_overriding_a_tied_head_unties_it(tmp_path, save_model):
    model = save_model(tmp_path / "in", tie_word_embeddings=True)
    head = torch.full_like(model.lm_head.weight, 0.25)
    out = write_dequantized(load_source(str(tmp_path / "in")), {"lm_head.weight": head}, tmp_path / "out")
    again = reload(out)
    assert torch.equal(again.lm_head.weight, head)
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_overrides_may_be_made_on_demand(tmp_path, save_model):
    model = save_model(tmp_path / "in")
    name = "model.norm.weight"
    out = write_dequantized(load_source(str(tmp_path / "in")), {name: lambda: torch.full((32,), 3.0)}, tmp_path / "out")
    assert torch.equal(reload(out).get_parameter(name), torch.full((32,), 3.0))
    assert model.get_parameter(name)[0] == 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model.nothing": torch.ones(3)}, "There is no parameter 'model.nothing' in in to override"),
        ({"model.norm.weight": torch.ones(3)}, r"'model\.norm\.weight' has shape \[3\], the model's is \[32\]"),
        ({"model.norm.weight": lambda: torch.ones(3)}, r"'model\.norm\.weight' has shape \[3\], the model's is \[32\]"),
    ],
)
def test_overrides_that_do_not_fit(tmp_path, save_model, overrides, words):
    save_model(tmp_path / "in")
    with pytest.raises(OutputError, match=words):
        write_dequantized(load_source(str(tmp_path / "in")), overrides, tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


def test_existing_folder(tmp_path, save_model):
    save_model(tmp_path / "in")
    with pytest.raises(OutputError, match="exists and is not empty"):
        write_dequantized(load_source(str(tmp_path / "in")), {}, tmp_path / "in")
