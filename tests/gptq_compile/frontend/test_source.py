# SPDX-License-Identifier: Apache-2.0
"""What a folder holds arrives under the model's names, whatever the checkpoint calls it."""

from __future__ import annotations

import hashlib
import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gptq_compile.frontend import binding
from gptq_compile.frontend.source import load_source
from gptq_compile.frontend.trace import trace


def assert_same_weights(model, source):
    """Every parameter of the model, tied ones too, is in the source with the same values in float32."""
    for name, tensor in model.named_parameters(remove_duplicate=False):
        got = source.params.get(name)
        assert got.dtype == torch.float32
        assert source.params.shape(name) == tuple(tensor.shape)
        assert torch.equal(got, tensor.float()), name


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize(
    ("model_type", "config"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {}), ("mixtral", {})],
    ids=["llama", "tied", "gpt2", "mixtral"],
)
def test_weights_are_bound_by_name(tmp_path, save_model, model_type, config, shard):
    model = save_model(tmp_path, model_type, shard=shard, **config)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    source = load_source(str(tmp_path))
    assert_same_weights(model, source)
    assert source.parameter_count == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_becomes_float32(tmp_path, save_model, dtype):
    model = save_model(tmp_path, dtype=dtype)
    assert_same_weights(model, load_source(str(tmp_path)))


def test_what_is_known_about_the_model(tmp_path, save_model):
    save_model(tmp_path / "my-model", max_position_embeddings=77)
    (tmp_path / "my-model" / "generation_config.json").write_text(
        '{"bos_token_id": 0, "eos_token_id": [1, 9, 100000], "temperature": 0.6, "do_sample": true}'
    )
    source = load_source(str(tmp_path / "my-model"))
    assert source.name == "my-model"
    assert source.vocab_size == 258
    assert source.context_length == 77
    assert source.bos_token_id == 0
    assert source.eos_token_ids == [1, 9]  # 100000 is no token of this model
    assert source.add_bos is False
    assert source.generation["temperature"] == 0.6
    assert source.tokenizer_files["tokenizer.json"] == tmp_path / "my-model" / "tokenizer.json"
    weights = (tmp_path / "my-model" / "model.safetensors").read_bytes()
    assert source.hashes()["model.safetensors"] == hashlib.sha256(weights).hexdigest()


def test_gpt2_without_its_prefix(tmp_path, save_model):
    model = save_model(tmp_path, "gpt2")
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)  # old checkpoints carry the causal mask
    assert "wte.weight" in tensors
    save_file(tensors, file)
    assert_same_weights(model, load_source(str(tmp_path)))


def test_tied_weight_stored_under_the_heads_name(tmp_path, save_model):
    model = save_model(tmp_path, tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file)
    source = load_source(str(tmp_path))
    assert_same_weights(model, source)
    assert source.params.canonical("model.embed_tokens.weight") == source.params.canonical("lm_head.weight")


@pytest.mark.parametrize("same", [True, False])
def test_tied_weight_stored_twice(tmp_path, save_model, same):
    """Equal copies are tied; different ones stay apart, as transformers loads them."""
    save_model(tmp_path, tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * (1 if same else 2)
    save_file(tensors, file)
    source = load_source(str(tmp_path))
    assert source.config.tie_word_embeddings is same
    assert (source.params.canonical("lm_head.weight") == "model.embed_tokens.weight") is same
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), source)
    program = trace(source.config, source.params)
    ids = torch.arange(9)
    logits = program.run(ids[None], ids[None], ids)
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(ids[None]).logits
    assert float(((logits - want) ** 2).mean() / (want**2).mean()) < 1e-10


def test_shards_without_an_index(tmp_path, save_model):
    model = save_model(tmp_path, shard="20KB")
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_same_weights(model, load_source(str(tmp_path)))


def test_loading_reads_no_tensor(tmp_path, save_model, monkeypatch):
    save_model(tmp_path, "mixtral")
    monkeypatch.setattr(
        "gptq_compile.frontend.checkpoint.Checkpoint.read", lambda self, name: pytest.fail("read " + name)
    )
    load_source(str(tmp_path))


def test_what_the_conversions_cannot_do_goes_through_transformers(tmp_path, save_model, monkeypatch, caplog):
    model = save_model(tmp_path, "mixtral")
    monkeypatch.setattr(binding, "_match", lambda *args: 1 / 0)
    with caplog.at_level(logging.WARNING):
        source = load_source(str(tmp_path))
    assert "transformers' own loader, in memory (ZeroDivisionError" in caplog.text
    assert_same_weights(model, source)


def test_a_tokenizer_class_that_changes_its_file_wins(tmp_path, save_model, caplog):
    """GPT2Tokenizer builds a byte-level pre-tokenizer whatever tokenizer.json says."""
    save_model(tmp_path, "gpt2")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "GPT2Tokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    core = json.loads((tmp_path / "tokenizer.json").read_text())
    core["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(core))
    source = load_source(str(tmp_path))
    from tokenizers import Tokenizer

    content = source.tokenizer_files["tokenizer.json"]
    kept = Tokenizer.from_str((content if isinstance(content, bytes) else content.read_bytes()).decode())
    for text in ("Hello World", "UPPER lower"):
        assert kept.encode(text).ids == source.tokenizer(text)["input_ids"]
