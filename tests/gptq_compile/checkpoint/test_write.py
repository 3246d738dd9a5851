# SPDX-License-Identifier: Apache-2.0
"""What is written is what was quantized, by an independent unpacker; configs say what other tools look for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from gptq_compile.api import compile_model
from gptq_compile.checkpoint.writer import check_shape, write_checkpoint
from gptq_compile.errors import ConfigError, OutputError
from gptq_compile.frontend.source import load_source
from gptq_compile.options import CompileOptions
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.grid import fit_groups
from gptq_compile.passes.gptq_quantize import GptqQuantize
from gptq_compile.passes.manager import PassManager

from .conftest import adopted, load_tensors, traced, unpacked

Write = Callable[..., Path]
DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("bits", "form", "settings"),
    [
        (4, "gptq", {}),
        (4, "gptq_v2", {"sym": True}),
        (2, "gptq", {"group_size": 16}),
        (3, "gptq_v2", {"group_size": -1}),
        (8, "gptq", {"sym": True, "group_size": 48}),  # the last group is short
        (4, "gptq", {"method": "gptq", "static_groups": False, "group_size": 16}),
        (3, "gptq", {"method": "gptq", "static_groups": False, "sym": True}),
    ],
)
def test_every_weight_is_the_dequantized_one(
    bits: int, form: str, settings: dict[str, Any], write: Write, tmp_path: Path
) -> None:
    out = write(form, dequantized=tmp_path / "dequantized", wbits=bits, **settings)
    tensors, wanted = load_tensors(out), load_tensors(tmp_path / "dequantized")
    config = json.loads((out / "quantize_config.json").read_text())
    assert json.loads((out / "config.json").read_text())["quantization_config"] == config
    permuted = settings.get("static_groups") is False
    said = {k: config[k] for k in ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "quant_method")}
    assert said == {
        "bits": bits, "group_size": settings.get("group_size", 32), "sym": settings.get("sym", False),
        "desc_act": permuted, "checkpoint_format": form, "quant_method": "gptq",
    }  # fmt: skip
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    assert len(modules) == 14
    for module in modules:
        made = unpacked(tensors, module, bits, 1 if form == "gptq" else 2)
        np.testing.assert_array_equal(made, wanted.pop(f"{module}.weight").numpy(), err_msg=module)
    index = tensors[f"{DOWN}.g_idx"].long()
    assert torch.equal(index, index.sort().values) != permuted
    for name, tensor in wanted.items():  # norms, embedding, head
        assert tensors[name].dtype == torch.float16
        assert torch.equal(tensors[name], tensor.half()), name
    assert AutoConfig.from_pretrained(out).model_type == "llama"
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"]
    assert (out / "generation_config.json").is_file()


def test_shards_have_an_index(tiny_model: Path, tmp_path: Path, write: Write) -> None:
    source, program, _ = adopted(write("gptq"), tiny_model)
    out = write_checkpoint(program, source, QuantizeConfig(), tmp_path / "out", shard_bytes=60_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {file.name for file in out.glob("model-*-of-*.safetensors")}
    assert len(files) > 2 and set(index["weight_map"].values()) == files
    assert set(index["weight_map"]) == set(load_tensors(out))
    again = load_source(str(out))
    for name, weight in source.codes.items():
        assert torch.equal(again.codes[name].codes(), weight.codes())


def test_a_quantized_head_is_stored_and_said(write: Write, save_model: Any, tmp_path: Path) -> None:
    save_model(tmp_path / "tied", tie_word_embeddings=True, vocab_size=288)
    out = write("gptq", tmp_path / "tied", quantize_lm_head=True, group_size=16)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["lm_head"] is True and config["tie_word_embeddings"] is False
    tensors = load_tensors(out)
    assert "lm_head.qweight" in tensors and "model.embed_tokens.weight" in tensors
    assert "lm_head.weight" in load_source(str(out)).codes


def test_conv1d_is_stored_as_its_codes(write: Write, save_model: Any, tmp_path: Path) -> None:
    save_model(tmp_path / "gpt2", "gpt2")
    out = write("gptq", tmp_path / "gpt2", dequantized=tmp_path / "dequantized", group_size=16)
    wanted, tensors = load_tensors(tmp_path / "dequantized"), load_tensors(out)
    name = "transformer.h.0.mlp.c_fc"
    made = unpacked(tensors, name, 4, 1)
    np.testing.assert_array_equal(made.T, wanted[f"{name}.weight"].numpy())
    assert torch.equal(tensors[f"{name}.bias"], wanted[f"{name}.bias"].half())
    source = load_source(str(out))
    assert torch.equal(source.params.get(f"{name}.weight"), wanted[f"{name}.weight"])


def test_what_is_not_quantized_is_dequantized_as_it_came(tiny_model: Path, tmp_path: Path) -> None:
    """Only an artifact computes in its target's half precision; a checkpoint's other tensors are the model's."""
    quantize = QuantizeConfig(method="rtn", sym=True, group_size=16)
    dequantized = tmp_path / "dequantized"
    compile_model(
        CompileOptions(
            str(tiny_model), tmp_path / "out", format="gptq", target="cuda:sm_90", quantize=quantize, validate=False,
            dequantized=dequantized,
        )
    )  # fmt: skip
    name = "model.embed_tokens.weight"
    came = load_source(str(tiny_model)).params.get(name)
    assert not torch.equal(came, came.half().float())
    assert torch.equal(load_tensors(dequantized)[name], came)


def test_linears_outside_the_blocks_stay_float(write: Write, tmp_path: Path, save_model: Any) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 258, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "word_embed_proj_dim": 32, "max_position_embeddings": 64,
    }  # fmt: skip
    save_model(tmp_path / "opt")  # for its tokenizer
    AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **sizes)).save_pretrained(tmp_path / "opt")
    out = write("gptq", tmp_path / "opt", dequantized=tmp_path / "dequantized")
    tensors, wanted = load_tensors(out), load_tensors(tmp_path / "dequantized")
    name = "model.decoder.project_in"
    assert torch.equal(tensors[f"{name}.weight"], wanted[f"{name}.weight"])
    assert r"-:^model\.decoder\.project_in$" in json.loads((out / "quantize_config.json").read_text())["dynamic"]
    assert name + ".weight" not in load_source(str(out)).codes


@pytest.mark.parametrize(("rows", "columns", "bits"), [(30, 64, 4), (64, 36, 3), (64, 8, 2), (33, 64, 8)])
def test_shapes_the_words_cannot_hold(rows: int, columns: int, bits: int) -> None:
    with pytest.raises(ConfigError, match="do not fill 32-bit words"):
        check_shape("a.weight", rows, columns, bits)


def test_experts_are_refused_before_any_work(write: Write, save_model: Any, tmp_path: Path) -> None:
    save_model(tmp_path / "mixtral", "mixtral")
    options = CompileOptions(
        model=str(tmp_path / "mixtral"), out=tmp_path / "out", format="gptq", quantize=QuantizeConfig(group_size=16)
    )
    with pytest.raises(ConfigError, match="experts of a layer"):
        compile_model(options, dry_run=True)


def test_a_zero_point_of_0_is_refused_in_version_1(tiny_model: Path, tmp_path: Path) -> None:
    source, program = traced(tiny_model)
    program = program.clone()
    settings = QuantizeConfig(method="rtn", group_size=32)
    PassManager([GptqQuantize(settings)], validate=False).run(program)
    zeros = program.params.get(f"{DOWN}.weight.zeros").clone()
    zeros[3, 1] = 0
    program.params.set(f"{DOWN}.weight.zeros", zeros)
    with pytest.raises(OutputError, match=rf"{DOWN} has 1 groups .* --format gptq_v2"):
        write_checkpoint(program, source, settings, tmp_path / "v1", form="gptq")
    assert not (tmp_path / "v1").exists()
    write_checkpoint(program, source, settings, tmp_path / "v2", form="gptq_v2")


@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grids_for_version_1_have_no_zero_point_of_0(bits: int, mse: bool) -> None:
    weight = torch.rand(64, 32, generator=torch.Generator().manual_seed(bits)) + 0.01  # nothing below 0
    assert int(fit_groups(weight, bits, False, 16, mse).zeros.min()) == 0
    grid = fit_groups(weight, bits, False, 16, mse, min_zero=1)
    assert int(grid.zeros.min()) == 1
    error = (grid.dequantize(grid.quantize(weight)) - weight).abs().max()
    if not mse:
        assert error <= 0.5001 * grid.scales.max()
