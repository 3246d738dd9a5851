# SPDX-License-Identifier: Apache-2.0
"""The pipelined kernel of quantized linears: divisions of the work under an emulator, what fits, and through nvcc."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import cuda_emulator

from gptq_compile.kernels.cuda import pipeline, pipeline_choice, pipeline_linear, stream
from gptq_compile.kernels.layouts import layout_for
from gptq_compile.kernels.registry import Case
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.words import Grouping
from tests.kernels.op_runner import needs_gxx, needs_nvcc
from tests.kernels.test_cuda_linear_codegen import _quant_case, _spill_free

OLDER, HOPPER, ALONE = (Target.parse(name) for name in ("cuda:sm_80,sm_90", "cuda:sm_90", "cuda:sm_90a"))


def _error(case: Case, rows: int, target: Target, plan: pipeline_choice.Plan | None, folder: Path) -> float:
    """Returns mean|difference| / mean|reference|."""
    rng = np.random.default_rng(rows)
    n, k, bits = case["out_features"], case["in_features"], case["bits"]
    grouping = Grouping.of(bits, k, case["group_size"])
    codes = rng.integers(0, 1 << bits, (n, k), dtype=np.uint8)
    scales = (rng.uniform(0.5, 2.0, (n, grouping.groups)) / 100).astype(np.float16).astype(np.float32)
    zeros = rng.integers(0, 1 << bits, scales.shape, dtype=np.uint8) if case["has_zeros"] else None
    zero = (zeros if zeros is not None else np.full(scales.shape, 1 << (bits - 1))).astype(np.float64)
    x, bias = rng.normal(size=(rows, k)).astype(np.float16), rng.normal(size=n).astype(np.float16)
    group = np.arange(k) // grouping.group_size
    reference = x.astype(np.float64) @ (scales.astype(np.float64)[:, group] * (codes - zero[:, group])).T
    reference += bias.astype(np.float64) if case["has_bias"] else 0
    out = np.full((rows, n), np.nan, np.float16)
    tensors = {"x": x, "bias": bias, "out": out, **layout_for(case, target).pack(case, codes, scales, zeros)}
    cuda_emulator.run(pipeline_linear.build(case, target, plan), target, tensors, rows, folder)
    return float(np.abs(out - reference).mean() / np.abs(reference).mean())


@needs_gxx
@pytest.mark.parametrize(
    ("bits", "group", "k", "n", "rows", "target", "config"),
    [
        (4, 128, 584, 75, 11, OLDER, pipeline.Config(2, 1, 8, 2, 1, 3)),
        (3, 32, 456, 83, 19, OLDER, pipeline.Config(1, 2, 16, 4, 1, 4)),
        (4, 64, 1096, 75, 9, HOPPER, pipeline.Config(2, 2, 16, 1, 3, 3)),
        (2, 96, 680, 67, 33, ALONE, pipeline.Config(3, 1, 32, 2, 2, 3)),
        (8, -1, 264, 49, 7, ALONE, pipeline.Config(2, 1, 8, 1, 1, 3)),
        pytest.param(3, 64, 328, 139, 140, ALONE, pipeline.Config(4, 2, 64, 1, 1, 4), marks=pytest.mark.slow),
        pytest.param(4, 128, 584, 297, 70, OLDER, pipeline.Config(8, 1, 64, 1, 1, 3), marks=pytest.mark.slow),
    ],
)
def test_divisions_match_float64(bits, group, k, n, rows, target, config, tmp_path):
    # Several tiles of tokens, parts of K without the same share of it, rows of no tile, groups inside a unit.
    assert _error(_quant_case(bits, group, k, n, None), rows, target, [(None, config)], tmp_path) < 1e-3


@needs_gxx
def test_the_number_of_rows_picks_the_kernel(tmp_path):
    case = _quant_case(4, 32, 328, 57, None)
    plan = pipeline_choice.choose(stream.Shape(0, 57, Grouping.of(4, 328, 32), True), OLDER.archs, False, False)
    assert plan is not None and [most for most, _ in plan] == [8, 16, 32, None]
    source = cuda_emulator.cuda_source(pipeline_linear.build(case, OLDER), OLDER)
    assert source.count('extern "C" __global__') == 4 + 4  # declared and defined
    for most, config in plan[:2]:
        assert _error(_quant_case(4, 32, 328, 57, most), most or 70, OLDER, None, tmp_path / str(most)) < 1e-3
        assert config.tokens == most


@pytest.mark.parametrize("archs", [("sm_90",), ("sm_80", "sm_89", "sm_90"), ("sm_90a",)])
@pytest.mark.parametrize("group", (-1, 32, 64, 128))
@pytest.mark.parametrize(("k", "n"), [(4096, 28672), (14336, 4096), (576, 192), (64, 16), (49152, 12288)])
def test_every_shape_has_a_division(k, n, group, archs):
    limit = min({"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_90a": 227}[arch] for arch in archs) * 1024
    clusters, natural = len(archs) == 1, archs == ("sm_90a",)
    for bits in (2, 3, 4, 8):
        shape = stream.Shape(0, n, Grouping.of(bits, k, group), True)
        plan = pipeline_choice.choose(shape, archs, clusters, natural)
        assert plan is not None and plan[-1][0] is None
        for most, config in plan:
            assert pipeline.shared_bytes(shape, config, natural) <= limit
            assert config.tokens >= min(most or 64, 64) and config.depth >= 3
            assert config.blocks == 1 or clusters


@needs_nvcc
@pytest.mark.parametrize("rows", [8, 16, pytest.param(32, marks=pytest.mark.slow), 4096])
@pytest.mark.parametrize(
    ("bits", "group"),
    [(4, 128), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((3, 32), (2, 64), (8, -1)))],
)
def test_nvcc_keeps_sums_in_registers(bits, group, rows, tmp_path):
    case = _quant_case(bits, group, 4096, 4097, None)
    shape = stream.Shape(0, 4097, Grouping.of(bits, 4096, group), True)
    config = pipeline_choice.best(shape, rows, OLDER.archs, False, False)
    assert config is not None
    source = cuda_emulator.cuda_source(pipeline_linear.build(case, OLDER, [(None, config)]), OLDER)
    assert _spill_free(source, 80, tmp_path)
