# SPDX-License-Identifier: Apache-2.0
"""Tiny models in onnxruntime: the logits of the quantized program, at once, token by token and in batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptq_compile.passes.evaluate import evaluate
from gptq_compile.passes.program import Program
from tests.architectures import traced
from tests.compile_check import nmse

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from tests.onnx_check import export, quantized, rounded

BAR = 1e-5
TOKENS = 21  # more than two windows of 8


def _want(program: Program, ids: np.ndarray) -> np.ndarray:
    return evaluate(program, torch.from_numpy(ids)).numpy()


@pytest.mark.parametrize("name", ["qwen3", "opt", "gpt2", "gemma3_text", "bloom", "gpt_oss"])
def test_logits_are_those_of_the_program(name: str, tmp_path: Path) -> None:
    program = quantized(name, group_size=16)
    model = export(program, tmp_path)
    assert {"MatMulNBits", "GroupQueryAttention"} <= model.operators()
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 250, (2, TOKENS))
    want = np.stack([_want(program, row) for row in ids])
    # A model that loses the cache, the positions or the window fails by far more than the bar.
    assert nmse(model.logits(ids, [TOKENS]), want) <= BAR
    assert nmse(model.logits(ids[:1], [9, *[1] * (TOKENS - 9)]), want[:1]) <= BAR
    assert nmse(model.logits(ids[1:], [5, TOKENS - 5]), want[1:]) <= BAR


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma2", {"head_dim": 12}),  # soft cap, window, grouped heads
        ("gpt_oss", {"head_dim": 12}),  # sinks
        ("bloom", {"hidden_size": 48}),  # ALiBi; one key head a query head
    ],
)
def test_attention_is_spelled_out_where_the_operator_has_no_form(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    program = quantized(name, group_size=16, **changes)
    model = export(program, tmp_path)
    assert "GroupQueryAttention" not in model.operators()
    ids = np.random.default_rng(1).integers(3, 250, (1, TOKENS))
    assert nmse(model.logits(ids, [9, *[1] * (TOKENS - 9)]), _want(program, ids[0])[None]) <= BAR


def test_other_bits_and_groups(tmp_path: Path) -> None:
    original = traced("llama", num_hidden_layers=1)
    ids = np.random.default_rng(2).integers(3, 250, (1, TOKENS))
    for wbits, group_size, sym in ((2, -1, False), (2, 32, True), (3, 24, False), (3, 64, True), (8, 20, False)):
        program = rounded(original.clone(), wbits, group_size, sym)
        folder = tmp_path / f"{wbits}-{group_size}"
        folder.mkdir()
        model = export(program, folder)
        assert nmse(model.logits(ids, [TOKENS]), _want(program, ids[0])[None]) <= BAR, (wbits, group_size)
        gathers = [n for n in model.proto.graph.node if n.op_type == "Gather" and "mlp" in n.name]
        assert bool(gathers) == (group_size in (24, 20))  # only where no block size divides the group
