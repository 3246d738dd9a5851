# SPDX-License-Identifier: Apache-2.0
"""A budget from the command line to the artifact."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest

import gptq_compile
from gptq_compile.cli.main import main

SHORT = ["--target", "cpu:x86-64-v3", "--group-size", "32", "--nsamples", "4", "--seqlen", "32", "--batch-buckets", "1"]


def test_mixed_bits_compute_what_the_dequantized_model_computes(
    compiled: Any, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    limit, out, dequantized = 180_000, tmp_path / "out", tmp_path / "dequantized"
    arguments = ["--max-size", f"{limit / 1000}kB", "--dequantized", str(dequantized), "--json", "-o", str(out)]
    arguments += ["--activations", "float", "--kv-cache", "float32"]
    assert main([str(compiled.model), *SHORT, *arguments]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert any(e["event"] == "note" and "bits a weight with scales" in e["text"] for e in events)
    assert 0.9 * limit < (out / "weights.safetensors").stat().st_size <= limit
    manifest = json.loads((out / "manifest.json").read_text())["quantization"]
    assert manifest["max_size"] == limit and 2 < manifest["budget"]["bits_per_weight"] < 8.8
    assert len({layer["bits"] for layer in manifest["layers"]}) > 1
    ids = np.random.default_rng(0).integers(0, 256, 40)
    model = AutoModelForCausalLM.from_pretrained(dequantized, dtype=torch.float32)
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)[None]).logits[0].double().numpy()
    with gptq_compile.Engine.load(out) as engine:
        for step in (False, True):
            got = engine.logits(ids, step=step).astype("float64")
            allowed = 1e-6 if step else 1e-9  # steps round activations to 16 bits, layer after layer
            assert np.square(got - wanted).sum() <= allowed * np.square(wanted).sum()
    assert main(["inspect", str(out)]) == 0
    assert "bits a weight on average" in capsys.readouterr().out


def test_the_plan_of_an_average(compiled: Any, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    assert main([str(compiled.model), *SHORT, "--avg-bits", "3.5", "--dry-run", "-o", str(tmp_path / "out")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "bits by measured sensitivity, 3.5 a weight on average" in printed and "3.50 bits a quantized" in printed
