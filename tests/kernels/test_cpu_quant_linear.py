# SPDX-License-Identifier: Apache-2.0
"""CPU quant_linear against float64: every bit width, odd groups, odd N, tails, biases, poisoned outputs."""

from __future__ import annotations

import numpy as np
import pytest

from gptq_compile.kernels.cpu.quant_linear import KERNELS
from gptq_compile.kernels.registry import Case
from gptq_compile.kernels.target import Target
from tests.kernels.cpu_linears import linear_case, nmse, operands, run_linear

CPU = Target.parse("cpu")


def _run(case: Case, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Returns (kernel output, float64 reference, kernel name) on random inputs."""
    x, codes, zeros = operands(case, rows, seed)
    ran = run_linear(KERNELS, case, CPU, x, codes, zeros)
    return ran.got, ran.reference(x), ran.name


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize(
    ("group", "k", "n", "rows"), [(32, 96, 48, 1), (20, 130, 37, 3), (128, 300, 17, 8), (-1, 77, 16, 2)]
)
def test_decode_matches_float64(bits, group, k, n, rows):
    case = linear_case(bits, group, k, n, rows, zeros=group != 128, bias=n % 2 == 1)
    got, reference, name = _run(case, rows, seed=bits * 1000 + k)
    assert name == "cpu.quant_linear.fused"
    assert nmse(got, reference) < 1e-10


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize(("group", "k", "n", "rows"), [(32, 96, 48, 17), (7, 50, 5, 1), (100, 530, 33, 257)])
def test_symbolic_rows_match_float64(bits, group, k, n, rows):
    case = linear_case(bits, group, k, n, None, zeros=bits != 4, bias=True)
    got, reference, name = _run(case, rows, seed=bits * 1000 + k)
    assert name == "cpu.quant_linear.panel"
    assert nmse(got, reference) < 1e-10


@pytest.mark.parametrize(("rows", "static"), [(1, True), (3, False)])
def test_groups_of_one_and_half_precision(rows, static):
    case = linear_case(4, 1, 33, 19, rows if static else None, dtype="float16", bias=True)
    got, reference, _ = _run(case, rows, seed=rows)
    assert got.dtype == np.float16
    assert nmse(got.astype(np.float64), reference) < 1e-6


@pytest.mark.parametrize("rows", [1, None])
def test_sums_of_half_activations_can_leave_in_float32(rows):
    got, reference, _ = _run(
        linear_case(4, 32, 96, 19, rows, dtype="float16", bias=True, out_dtype="float32"), 1, seed=5
    )
    assert got.dtype == np.float32
    assert nmse(got, reference) < 1e-10


def test_refusals_are_words():
    fused, panel = KERNELS
    refusal = fused.can_implement(linear_case(4, 32, 64, 16, 9), CPU)
    assert refusal is not None and refusal.reason == "is for 1 to 8 rows known at compile time, not 9"
    refusal = panel.can_implement(linear_case(5, 32, 64, 16, None), CPU)
    assert refusal is not None and "Codes of 5 bits cannot be packed" in refusal.reason
