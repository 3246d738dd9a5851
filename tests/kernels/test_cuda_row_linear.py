# SPDX-License-Identifier: Apache-2.0
"""CUDA linears with half weights and few rows: the generated source, run by an emulator, against float64."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import cuda_emulator

from gptq_compile.kernels.cuda import linear, row_linear, stream
from gptq_compile.kernels.registry import Case, select
from gptq_compile.kernels.target import Target
from tests.kernels.op_runner import needs_gxx
from tests.kernels.test_cuda_linear_codegen import _spill_free

CUDA = Target.parse("cuda:sm_80,sm_90")
HOPPER = Target.parse("cuda:sm_90a")
SMALL = Target.parse("cuda:sm_89")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def _case(rows, k=4096, n=128256, dtype="float16", **attrs) -> Case:
    return Case.make("linear", dtype, rows, in_features=k, out_features=n, **{"has_bias": False, **attrs})


@needs_gxx
@pytest.mark.parametrize(
    ("k", "n", "rows", "target"),
    [
        (8, 1, 1, CUDA),
        (1160, 37, 1, HOPPER),  # the last turn is part of one
        (264, 2200, 2, CUDA),  # several tiles in turn
        (136, 35, 13, HOPPER),  # two columns of eight tokens
        (136, 6400, 4, HOPPER),  # four tiles side by side
        (1160, 2136, 16, SMALL),  # K in parts
    ],
)
def test_rows_matches_float64(k, n, rows, target, tmp_path):
    rng = np.random.default_rng(k)
    case = _case(rows, k, n, has_bias=True, out_dtype="float32")
    x, w = rng.normal(size=(rows, k)).astype(np.float16), rng.normal(size=(n, k)).astype(np.float16)
    bias, out = rng.normal(size=n).astype(np.float16), np.full((rows, n), np.nan, np.float32)
    picked = select(case, target, linear.KERNELS).kernel
    assert picked.name == "cuda.linear.rows"
    cuda_emulator.run(
        picked.prim_func(case, target), target, {"x": x, "w": w, "bias": bias, "out": out}, rows, tmp_path
    )
    reference = x.astype(np.float64) @ w.astype(np.float64).T + bias.astype(np.float64)
    assert np.abs(out - reference).mean() / np.abs(reference).mean() < 1e-5


@needs_gxx
@pytest.mark.parametrize(("k", "n", "rows", "out"), [(136, 35, 3, "bfloat16"), (576, 2200, 9, "float32")])
def test_linear_multiplies_bfloat16(k, n, rows, out, tmp_path):
    rng = np.random.default_rng(n)

    def widened(words):
        return (words.astype(np.uint32) << 16).view(np.float32)

    x, w, bias = (
        (rng.normal(size=size).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        for size in ((rows, k), (n, k), (n,))
    )
    case = Case.make(
        "linear", "bfloat16", rows, in_features=k, out_features=n, has_bias=True, out_dtype=out, weight_dtype="bfloat16"
    )
    result = np.full((rows, n), np.nan, np.float32) if out == "float32" else np.full((rows, n), 0x7FFF, np.uint16)
    picked = select(case, HOPPER, linear.KERNELS).kernel
    tensors = {"x": x, "w": w, "bias": bias, "out": result}
    cuda_emulator.run(picked.prim_func(case, HOPPER), HOPPER, tensors, rows, tmp_path)
    reference = widened(x).astype(np.float64) @ widened(w).T.astype(np.float64) + widened(bias)
    error = np.abs((result if out == "float32" else widened(result)) - reference).mean() / np.abs(reference).mean()
    assert error < (1e-5 if out == "float32" else 2.0**-8)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (_case(None), "1 to 16 rows known at compile time, not symbolic"),
        (_case(17), "1 to 16 rows known at compile time, not 17"),
        (_case(1, dtype="float32"), "float16 or bfloat16 activations, not float32"),
        (_case(1, weight_dtype="float32"), "weights of the activations' type float16, not float32"),
        (_case(1, out_dtype="bfloat16"), "stores float16 or float32, not bfloat16"),
        (_case(1, k=4100), "multiple of 8, not 4100"),
        (_case(16, k=1 << 20), "16 rows of 1048576 leave too little shared memory"),
    ],
)
def test_rows_refuses_in_words(case, words):
    assert words in str(row_linear.accepts(case, HOPPER))


@pytest.mark.parametrize("target", (CUDA, HOPPER))
@pytest.mark.parametrize("n", (35, 4096, 128256))
@pytest.mark.parametrize("k", (64, 576, 4096, 14336))
@pytest.mark.parametrize("rows", (1, 2, 4, 8, 16))
def test_rows_keeps_enough_under_way(rows, k, n, target):
    config = row_linear.choose(rows, n, k, target.archs, target is HOPPER)
    if config is None:
        assert target is CUDA and rows * k > 8 * 4096
        return
    assert row_linear.shared_bytes(rows, n, k, config) <= min(stream.limits(target.archs)) - stream.RESERVED
    # All that a warp will ever ask for, or 32 KiB a multiprocessor on the way while a turn is multiplied.
    asked = -(-k // (64 * config.splits * config.units)) * -(-n // (16 * stream.BLOCKS * config.tiles))
    assert config.depth > asked or (config.depth - 1) * config.warps * config.slot_bytes >= 32 << 10
    assert 0 <= config.early < config.depth


@pytest.mark.parametrize(("rows", "n", "k", "target"), [(8, 4096, 14336, HOPPER), (16, 2136, 1160, SMALL)])
def test_many_activations_are_staged_in_parts(rows, n, k, target):
    config = row_linear.choose(rows, n, k, target.archs, target is HOPPER)
    assert config is not None and config.parts > 1


@needs_nvcc
@pytest.mark.parametrize("rows", (1, 16))
def test_nvcc_makes_rows_without_spills(rows, tmp_path):
    case = _case(rows, k=12288, n=50272)
    source = cuda_emulator.cuda_source(select(case, HOPPER).kernel.prim_func(case, HOPPER), HOPPER)
    assert "gq_rows_" in source
    assert _spill_free(source, 90, tmp_path)
