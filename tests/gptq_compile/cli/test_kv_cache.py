# SPDX-License-Identifier: Apache-2.0
"""``--kv-cache int8`` from the command line to the engine."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
import torch

import gptq_compile
from gptq_compile.cli.main import main

OPTIONS = ("--target", "cpu:x86-64-v3", "--method", "rtn", "--group-size", "32", "--batch-buckets", "1")


def test_an_artifact_whose_cache_has_8_bits(
    tiny_model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    out, dequantized = tmp_path / "out", tmp_path / "dequantized"
    arguments = ["--activations", "float", "--kv-cache", "int8", "--dequantized", str(dequantized), "-o", str(out)]
    assert main([str(tiny_model), *OPTIONS, *arguments]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    (layer, *_), cache = manifest["kv_cache"]["layers"], manifest["kv_cache"]
    assert cache["dtype"] == manifest["quantization"]["kv_cache"] == "int8"
    model = AutoModelForCausalLM.from_pretrained(dequantized, dtype=torch.float32)
    config = model.config
    assert layer["head_dim"] == layer["v_head_dim"] == config.hidden_size // config.num_attention_heads
    ids = np.random.default_rng(0).integers(0, 256, 40)
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)[None]).logits[0].double().numpy()
    with gptq_compile.Engine.load(out) as engine:
        heads = config.num_key_value_heads * config.num_hidden_layers
        assert engine.manifest.cache_bytes_per_token == heads * 2 * (layer["head_dim"] + 4)
        for step in (False, True):
            got = engine.logits(ids, step=step).astype(np.float64)
            assert 1e-8 < ((got - wanted) ** 2).sum() / (wanted**2).sum() < 5e-3
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    assert "(int8, pages of 16)" in " ".join(capsys.readouterr().out.split())
