# SPDX-License-Identifier: Apache-2.0
"""Checkpoints go in bit for bit, mislabelled zero points are noticed, and settings that contradict are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gptq_compile
from gptq_compile.checkpoint.layout import pack, unpack
from gptq_compile.checkpoint.settings import settled
from gptq_compile.checkpoint.writer import write_checkpoint
from gptq_compile.cli.main import main
from gptq_compile.errors import ConfigError, ModelError
from gptq_compile.frontend.source import load_source
from gptq_compile.options import CompileOptions
from gptq_compile.passes.gptq.config import QuantizeConfig

from .conftest import adopted, configure, load_tensors, save_tensors, unpacked

Write = Callable[..., Path]
UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("bits", "form", "settings"),
    [
        (4, "gptq", {}),
        (2, "gptq_v2", {}),
        (3, "gptq", {"sym": True, "group_size": 48}),
        (8, "gptq_v2", {"method": "gptq", "static_groups": False, "group_size": 48}),
    ],
)
def test_a_checkpoint_comes_out_as_it_went_in(
    bits: int, form: str, settings: dict[str, Any], write: Write, tiny_model: Path
) -> None:
    first = write(form, wbits=bits, **settings)
    source, program, adopt = adopted(first, tiny_model)
    assert {r.method for r in adopt.reports} == {"checkpoint"} and {r.bits for r in adopt.reports} == {bits}
    again = write_checkpoint(program, source, QuantizeConfig(), first.with_name("again"), form=form)
    before, after = load_tensors(first), load_tensors(again)
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    made = unpacked(before, UP, bits, 1 if form == "gptq" else 2)
    np.testing.assert_array_equal(source.params.get(f"{UP}.weight").numpy(), made)


def test_versions_convert_into_each_other(write: Write, tiny_model: Path) -> None:
    first = write("gptq", wbits=3)
    source, program, _ = adopted(first, tiny_model)
    second = write_checkpoint(program, source, QuantizeConfig(), first.with_name("v2"), form="gptq_v2")
    source, program, _ = adopted(second, tiny_model)
    third = write_checkpoint(program, source, QuantizeConfig(), first.with_name("v1"), form="gptq")
    one, two, three = (load_tensors(folder) for folder in (first, second, third))
    assert all(torch.equal(one[name], three[name]) for name in one)
    different = {name for name in one if not torch.equal(one[name], two[name])}
    assert different == {name for name in one if name.endswith(".qzeros")}


@pytest.mark.slow
def test_compiled_logits_are_those_of_the_dequantized_model(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    from transformers import AutoModelForCausalLM

    assert main([str(checkpoint), "--target", "cpu:x86-64-v3", "--batch-buckets", "1", "--activations", "float",
                 "--kv-cache", "float32", "--dequantized", str(tmp_path / "float"),
                 "-o", str(tmp_path / "out")]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert (
        "codes of the checkpoint as they are (gptq, written by gptq-compile" in said and "GPTQ, act-order" not in said
    )
    ids = np.random.default_rng(0).integers(0, 256, 40)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32)
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)[None]).logits[0].double().numpy()
    with gptq_compile.Engine.load(tmp_path / "out") as engine:
        got = engine.logits(ids)
    assert ((got - wanted) ** 2).sum() / (wanted**2).sum() < 1e-9
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["quantization"]["checkpoint"].startswith("codes of the checkpoint")
    assert {layer["method"] for layer in manifest["quantization"]["layers"]} == {"checkpoint"}


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_wrong_label_is_noticed_and_said(bits: int, form: str, sym: bool, write: Write) -> None:
    folder = write(form, wbits=bits, sym=sym)
    right = load_source(str(folder))
    assert right.notes == ()
    wanted = right.params.get(f"{UP}.weight")
    other = {"gptq": "gptq_v2", "gptq_v2": "gptq"}[form]
    configure(folder, checkpoint_format=other)
    wrong = load_source(str(folder))
    assert len(wrong.notes) == 1 and f"labelled {other}, but" in wrong.notes[0]
    assert torch.equal(wrong.params.get(f"{UP}.weight"), wanted)


def test_zero_points_that_borrowed_are_read_as_their_writer_wrote_them(write: Write) -> None:
    folder = write("gptq_v2", group_size=16)
    tensors = load_tensors(folder)
    zeros = unpack(tensors[f"{UP}.qzeros"].t(), 4, 128)
    zeros[7, 2] = 0
    tensors[f"{UP}.qzeros"] = pack(zeros, 4).t().contiguous()
    save_tensors(folder, tensors)
    wanted = load_source(str(folder)).params.get(f"{UP}.weight")
    for name in [n for n in tensors if n.endswith(".qzeros")]:
        tensors[name] = tensors[name] - 0x11111111  # as GPTQModel goes from version 2 to 1
    save_tensors(folder, tensors)
    configure(folder, checkpoint_format="gptq", meta={"quantizer": ["gptqmodel:7.7.0"]})
    assert torch.equal(load_source(str(folder)).params.get(f"{UP}.weight"), wanted)


def test_old_spellings_and_a_config_of_its_own(checkpoint: Path) -> None:
    wanted = load_source(str(checkpoint)).params.get(f"{UP}.weight")
    config = json.loads((checkpoint / "config.json").read_text())
    del config["quantization_config"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "quantize_config.json").write_text(json.dumps({"wbits": 4, "q_group_size": 32, "sym": False}))
    source = load_source(str(checkpoint))
    assert source.quantization is not None and source.quantization.version == 1
    assert torch.equal(source.params.get(f"{UP}.weight"), wanted)


def test_linears_with_settings_of_their_own(write: Write, tmp_path: Path, tiny_model: Path) -> None:
    four = write("gptq")
    eight = write("gptq", wbits=8, group_size=16)
    mixed, better = load_tensors(four), load_tensors(eight)
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        mixed[f"{UP}.{part}"] = better[f"{UP}.{part}"]
    save_tensors(four, mixed)
    configure(four, dynamic={r"+:.*layers\.0\.mlp\.up_proj": {"bits": 8, "group_size": 16}})
    source, program, _ = adopted(four, tiny_model)
    np.testing.assert_array_equal(source.params.get(f"{UP}.weight").numpy(), unpacked(better, UP, 8, 1))
    out = write_checkpoint(program, source, QuantizeConfig(), tmp_path / "again")
    assert json.loads((out / "quantize_config.json").read_text())["dynamic"] == {
        r"+:^model\.layers\.0\.mlp\.up_proj$": {"bits": 8, "group_size": 16}
    }
    again = load_tensors(out)
    assert all(torch.equal(tensor, again[name]) for name, tensor in mixed.items())


def test_a_short_group_that_is_not_the_last(write: Write) -> None:
    folder = write("gptq", group_size=48, method="gptq", static_groups=False)  # 64 and 128 input features
    tensors = load_tensors(folder)
    wanted = unpacked(tensors, UP, 4, 1)
    order = torch.tensor([1, 0])  # stored group 0 is now the short one
    zeros = unpack(tensors[f"{UP}.qzeros"].t(), 4, 128)
    tensors[f"{UP}.qzeros"] = pack(zeros[:, order], 4).t().contiguous()
    tensors[f"{UP}.scales"] = tensors[f"{UP}.scales"][order]
    tensors[f"{UP}.g_idx"] = 1 - tensors[f"{UP}.g_idx"]
    save_tensors(folder, tensors)
    source = load_source(str(folder))
    assert torch.equal(source.params.get(f"{UP}.weight"), torch.from_numpy(wanted))
    index = source.codes[f"{UP}.weight"].g_idx
    assert index is not None and torch.bincount(index.long()).tolist() == [48, 16]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"wbits": 3}, r"contradicts --wbits \(wbits 3\)"),
        ({"group_size": 64}, "contradicts --group-size"),
        ({"sym": True}, "contradicts --sym"),
        ({"damp": 0.01}, "--damp has nothing to do"),
        ({"avg_bits": 3.5}, "--avg-bits has nothing to do"),
        ({"tune_epochs": 2}, "--tune-epochs has nothing to do"),
        ({"method": "rtn"}, "--method has nothing to do"),
    ],
)
def test_settings_that_contradict(settings: dict[str, Any], words: str, written: Path, tmp_path: Path) -> None:
    given = QuantizeConfig(**settings)
    options = CompileOptions(model=str(written), out=tmp_path / "out", quantize=given)
    with pytest.raises(ConfigError, match=words):
        settled(options, load_source(str(written)).quantization, "tiny")


def test_settings_that_agree_are_no_contradiction(written: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = [str(written), "--wbits", "4", "--group-size", "32", "--asym", "-o", str(tmp_path / "out"), "--dry-run"]
    assert main(arguments) == 0
    assert "4.75 bits a quantized weight" in capsys.readouterr().out
    assert main([*arguments, "--calibration", "text.txt"]) == 2
    assert "--calibration has nothing to do" in capsys.readouterr().err


def test_bias_without_a_place(checkpoint: Path) -> None:
    tensors = load_tensors(checkpoint)
    tensors[f"{UP}.bias"] = torch.zeros(128, dtype=torch.float16)  # as AutoGPTQ writes for every linear
    save_tensors(checkpoint, tensors)
    load_source(str(checkpoint))
    tensors[f"{UP}.bias"][5] = 1
    save_tensors(checkpoint, tensors)
    with pytest.raises(ModelError, match=f"bias '{UP}.bias', which the model has no place for"):
        load_source(str(checkpoint))


def test_scales_in_bfloat16_are_rounded_and_said(checkpoint: Path) -> None:
    tensors = load_tensors(checkpoint)
    tensors[f"{UP}.scales"] = tensors[f"{UP}.scales"].bfloat16()
    save_tensors(checkpoint, tensors)
    source = load_source(str(checkpoint))
    assert source.notes == (f"Scales stored as BF16 (1 linears, first {UP}) are rounded to float16.",)
    scales = source.codes[f"{UP}.weight"].scales()
    assert torch.equal(scales.t(), tensors[f"{UP}.scales"].half().float())
