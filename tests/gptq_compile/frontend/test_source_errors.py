# SPDX-License-Identifier: Apache-2.0
"""Every kind of bad input gets one sentence that names it."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gptq_compile.errors import ModelError
from gptq_compile.frontend.source import load_source


@pytest.fixture
def folder(tmp_path, save_model):
    save_model(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path, save_model):
    save_model(tmp_path, shard="20KB")
    return tmp_path


def refusal(model) -> str:
    """The sentence that loading ends in."""
    with pytest.raises(ModelError) as error:
        load_source(str(model))
    assert "\n" not in str(error.value)
    return str(error.value)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder, change):
    """Changes the tensors of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


NORM = "model.layers.1.input_layernorm.weight"


def test_missing_shard(sharded):
    shards = sorted(sharded.glob("model-*.safetensors"))
    shards[2].unlink()
    assert refusal(sharded) == (
        f"The shard {shards[2]} is missing, although model.safetensors.index.json lists it. Download the model "
        "again or "
        f"copy the missing file; {len(shards) - 1} of {len(shards)} shards are there."
    )


def test_missing_shard_without_an_index(sharded):
    shards = sorted(sharded.glob("model-*.safetensors"))
    (sharded / "model.safetensors.index.json").unlink()
    shards[1].unlink()
    assert refusal(sharded) == f"Shard 2 of {len(shards)} is missing in {sharded}. Download the model again."


@pytest.mark.parametrize("keep", [0, 5, 100, -1], ids=["empty", "length", "header", "data"])
def test_truncated_shard(sharded, keep):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    assert re.fullmatch(
        re.escape(f"{shard} is truncated or corrupt (") + r".+\)\. Download it again\.", refusal(sharded)
    )


def test_corrupt_header(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:12] = b"\xff\xff\xff\xff"
    file.write_bytes(content)
    assert refusal(folder).startswith(f"{file} is truncated or corrupt (")


def test_shard_of_another_model(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    shard = sharded / index["weight_map"][NORM]
    tensors = load_file(shard)
    del tensors[NORM]
    save_file(tensors, shard)
    assert refusal(sharded) == (
        f"{shard} has no tensor {NORM!r}, which model.safetensors.index.json says it holds: the shard is from another "
        "model or was not written to its end. Download it again."
    )


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_bad_index(sharded, index):
    (sharded / "model.safetensors.index.json").write_text(index)
    assert refusal(sharded).startswith(
        f"{sharded / 'model.safetensors.index.json'} is not a valid index of safetensors"
    )


def test_tensor_of_the_wrong_shape(folder):
    rewrite(folder, lambda tensors: tensors.update({NORM: torch.ones(31)}))
    assert refusal(folder) == (
        f"The tensor {NORM!r} in {folder / 'model.safetensors'} has shape [31], but the config of the llama "
        "model asks for "
        "[32]. Check that config.json belongs to these weights."
    )


def test_missing_tensor(folder):
    rewrite(folder, lambda tensors: tensors.pop(NORM))
    assert refusal(folder) == (
        f"{folder} has no tensor for {NORM!r}, which the llama model needs. Check that all shards are there and that "
        "config.json belongs to these weights."
    )


def test_fewer_layers_than_the_config(folder):
    edit(folder / "config.json", num_hidden_layers=3)
    assert re.match(
        rf"{folder} has no tensor for 'model\.layers\.2\.\S+' \(and 8 more\), which the llama", refusal(folder)
    )


@pytest.mark.parametrize(("value", "count"), [(float("nan"), 1), (float("inf"), 2), (-float("inf"), 3)])
def test_not_finite_weight_is_named_when_read(folder, value, count):
    def spoil(tensors):
        tensors[NORM][:count] = value

    rewrite(folder, spoil)
    source = load_source(str(folder))
    source.params.get("model.layers.0.input_layernorm.weight")
    for _ in range(2):  # not only the first time
        with pytest.raises(ModelError) as error:
            source.params.get(NORM)
        assert str(error.value) == (
            f"The tensor {NORM!r} in {folder / 'model.safetensors'} holds {count} NaN or infinite values of 32; the "
            "checkpoint is damaged or diverged in training. Download it again or use another one."
        )


def test_large_finite_weights_are_no_infinity(folder):
    rewrite(folder, lambda tensors: tensors.update({NORM: torch.full((32,), 3e38)}))
    assert load_source(str(folder)).params.get(NORM)[0] == 3e38


def test_a_nan_in_one_expert(tmp_path, save_model):
    save_model(tmp_path, "mixtral")
    rewrite(tmp_path, lambda t: t["model.layers.0.block_sparse_moe.experts.2.w1.weight"].fill_(float("nan")))
    source = load_source(str(tmp_path))
    with pytest.raises(ModelError, match=r"'model\.layers\.0\.mlp\.experts\.gate_up_proj' in .* holds \d+ NaN"):
        source.params.get("model.layers.0.mlp.experts.gate_up_proj")


def test_pickled_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert refusal(folder) == (
        f"{folder} has its weights in pytorch_model.bin, a pickle, which can run code when it is opened. "
        "Convert it where "
        "you trust it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes "
        "safetensors; then "
        "give the new folder."
    )


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == (
        f"{folder} has a config.json but no weights: neither model.safetensors nor "
        "model.safetensors.index.json. Download "
        "the weights."
    )


def test_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    assert refusal(folder) == (
        f"{folder} has no tokenizer: add tokenizer.json (and tokenizer_config.json) from the model's page."
    )


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": 3}'])
def test_damaged_tokenizer(folder, content):
    (folder / "tokenizer.json").write_text(content)
    assert re.match(rf"The tokenizer of {folder} cannot be read \(.+\)\. Download its files again\.", refusal(folder))


def test_no_config(folder):
    (folder / "config.json").unlink()
    assert refusal(folder) == f"{folder} has no config.json, so it is not a Hugging Face model folder."


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_damaged_config(folder, content):
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    assert refusal(folder).startswith(f"{folder / 'config.json'} is not a valid model config (")


def test_config_with_a_value_of_the_wrong_kind(folder):
    edit(folder / "config.json", hidden_size="many")
    assert refusal(folder).startswith(f"transformers does not accept {folder / 'config.json'} (")


def test_unknown_model_type(folder):
    edit(folder / "config.json", model_type="frobnicator")
    assert refusal(folder) == (
        f"The model type 'frobnicator' in {folder / 'config.json'} is not known to transformers "
        f"{transformers.__version__}. "
        "Check the config, or update transformers."
    )


def test_remote_code_is_off(folder):
    edit(folder / "config.json", model_type="frobnicator", auto_map={"AutoConfig": "evil.Config"})
    (folder / "evil.py").write_text("raise SystemExit('code of the repository was run')")
    assert refusal(folder) == (
        f"The model type 'frobnicator' of {folder} runs Python code from its repository. Read that code, and if "
        "you trust "
        "it pass --trust-remote-code."
    )


def test_no_causal_language_model(folder):
    edit(folder / "config.json", model_type="vit")
    assert refusal(folder) == (
        "transformers has no causal language model of type 'vit'; give a model that generates text."
    )


def test_already_quantized(folder):
    edit(folder / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    assert refusal(folder) == (
        f"The checkpoint {folder} is already quantized, by method 'awq'; of those only GPTQ checkpoints are read. Give "
        "the float16, bfloat16 or float32 checkpoint it was made from."
    )


def test_float8_without_a_quantization_config(folder):
    rewrite(folder, lambda tensors: tensors.update({NORM: tensors[NORM].to(torch.float8_e4m3fn)}))
    with pytest.raises(
        ModelError, match=rf"The tensor '{NORM}' .* is stored as F8_E4M3: the checkpoint is already quantized"
    ):
        load_source(str(folder)).params.get(NORM)


def test_empty_folder(tmp_path):
    assert (
        refusal(tmp_path) == f"{tmp_path} is an empty folder. Give the folder that holds config.json and the weights."
    )


def test_no_such_path(tmp_path):
    path = tmp_path / "nothing" / "here"
    assert refusal(path) == (
        f"{path} does not exist. Give a Hugging Face folder, a .gguf file, or a hub id (org/name)."
    )


def test_other_file(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    assert refusal(tmp_path / "notes.txt") == (
        f"{tmp_path / 'notes.txt'} is a file but not a GGUF file. Give the folder it lies in, or a .gguf file."
    )


def test_revision_of_a_folder(folder):
    with pytest.raises(ModelError, match="the revision 'main' has no meaning; leave it out"):
        load_source(str(folder), revision="main")
