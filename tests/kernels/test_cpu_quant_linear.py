# SPDX-License-Identifier: Apache-2.0
"""CPU quant_linear against float64: every bit width, odd groups, odd N, tails, biases, poisoned outputs."""

from __future__ import annotations

import numpy as np
import pytest

from gptq_compile.kernels.cpu.quant_linear import KERNELS
from gptq_compile.kernels.layouts import layout_for
from gptq_compile.kernels.registry import Case, select
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import tvm
from gptq_compile.kernels.words import Grouping

CPU = Target.parse("cpu")


def _run(case: Case, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Returns (kernel output, float64 reference, kernel name) on random inputs."""
    rng = np.random.default_rng(seed)
    n, k, bits = case["out_features"], case["in_features"], case["bits"]
    grouping = Grouping.of(bits, k, case["group_size"])
    codes = rng.integers(0, 1 << bits, (n, k), dtype=np.uint8)
    scales = (rng.uniform(0.5, 2.0, (n, grouping.groups)) / 100).astype(np.float16).astype(np.float32)
    zeros = rng.integers(0, 1 << bits, scales.shape, dtype=np.uint8) if case["has_zeros"] else None
    x = rng.normal(size=(rows, k)).astype(case.dtype)
    bias = rng.normal(size=n).astype(case.dtype) if case["has_bias"] else None
    zero = (zeros if zeros is not None else np.full(scales.shape, 1 << (bits - 1))).astype(np.float64)
    group = np.arange(k) // grouping.group_size
    weight = scales.astype(np.float64)[:, group] * (codes - zero[:, group])
    reference = x.astype(np.float64) @ weight.T + (0 if bias is None else bias.astype(np.float64))
    picked = select(case, CPU, KERNELS).kernel
    library = tvm.compile(picked.prim_func(case, CPU), target=CPU.tvm())
    out = tvm.runtime.tensor(np.full((rows, n), np.nan, case.get("out_dtype", case.dtype)))
    packed = layout_for(case, CPU).pack(case, codes, scales, zeros)
    arguments = [x, *packed.values(), *([] if bias is None else [bias])]
    library["quant_linear"](*map(tvm.runtime.tensor, arguments), out)
    return out.numpy(), reference, picked.name


def _nmse(got: np.ndarray, reference: np.ndarray) -> float:
    return float(np.sum((got - reference) ** 2) / np.sum(reference**2))


def _case(bits, group, k, n, rows, zeros=True, bias=False, dtype="float32", **attrs) -> Case:
    return Case.make(
        "quant_linear", dtype, rows, in_features=k, out_features=n, bits=bits, group_size=group,
        has_zeros=zeros, has_bias=bias, **attrs,
    )  # fmt: skip


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize(
    ("group", "k", "n", "rows"), [(32, 96, 48, 1), (20, 130, 37, 3), (128, 300, 17, 8), (-1, 77, 16, 2)]
)
def test_decode_matches_float64(bits, group, k, n, rows):
    case = _case(bits, group, k, n, rows, zeros=group != 128, bias=n % 2 == 1)
    got, reference, name = _run(case, rows, seed=bits * 1000 + k)
    assert name == "cpu.quant_linear.fused"
    assert _nmse(got, reference) < 1e-10


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize(("group", "k", "n", "rows"), [(32, 96, 48, 17), (7, 50, 5, 1), (100, 530, 33, 257)])
def test_symbolic_rows_match_float64(bits, group, k, n, rows):
    case = _case(bits, group, k, n, None, zeros=bits != 4, bias=True)
    got, reference, name = _run(case, rows, seed=bits * 1000 + k)
    assert name == "cpu.quant_linear.panel"
    assert _nmse(got, reference) < 1e-10


@pytest.mark.parametrize(("rows", "static"), [(1, True), (3, False)])
def test_groups_of_one_and_half_precision(rows, static):
    case = _case(4, 1, 33, 19, rows if static else None, dtype="float16", bias=True)
    got, reference, _ = _run(case, rows, seed=rows)
    assert got.dtype == np.float16
    assert _nmse(got.astype(np.float64), reference) < 1e-6


@pytest.mark.parametrize("rows", [1, None])
def test_sums_of_half_activations_can_leave_in_float32(rows):
    got, reference, _ = _run(_case(4, 32, 96, 19, rows, dtype="float16", bias=True, out_dtype="float32"), 1, seed=5)
    assert got.dtype == np.float32
    assert _nmse(got, reference) < 1e-10


def test_refusals_are_words():
    fused, panel = KERNELS
    refusal = fused.can_implement(_case(4, 32, 64, 16, 9), CPU)
    assert refusal is not None and refusal.reason == "is for 1 to 8 rows known at compile time, not 9"
    refusal = panel.can_implement(_case(5, 32, 64, 16, None), CPU)
    assert refusal is not None and "Codes of 5 bits cannot be packed" in refusal.reason
