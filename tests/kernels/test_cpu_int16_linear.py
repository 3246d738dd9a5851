# SPDX-License-Identifier: Apache-2.0
"""The integer quant_linear of the CPU against float64 and at the ends of its number ranges."""

from __future__ import annotations

import numpy as np
import pytest

from gptq_compile.kernels.cpu.int16_linear import KERNELS
from gptq_compile.kernels.registry import Case, select
from gptq_compile.kernels.target import Target
from tests.kernels.cpu_linears import linear_case, nmse, operands, run_linear

CPU = Target.parse("cpu")


def _run(case: Case, x: np.ndarray, codes: np.ndarray, zeros: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns (kernel output, float64 reference)."""
    ran = run_linear(KERNELS, case, CPU, x, codes, zeros)
    return ran.got, ran.reference(x)


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize(
    ("group", "k", "n", "rows"), [(128, 576, 48, 1), (20, 130, 37, 3), (128, 300, 17, 8), (-1, 600, 16, 2)]
)
def test_matches_float64(bits, group, k, n, rows):
    case = linear_case(bits, group, k, n, rows, zeros=group != 128 or k == 576, bias=n % 2 == 1)
    x, codes, zeros = operands(case, rows, seed=bits * 1000 + k)
    got, reference = _run(case, x, codes, zeros)
    assert nmse(got, reference) < 5e-9


@pytest.mark.parametrize(("code", "zero"), [(255, 0), (0, 255), (255, 255)])
def test_the_largest_sums_do_not_wrap(code, zero):
    case = linear_case(8, -1, 512, 16, 2)
    x = np.full((2, 512), 3.0, np.float32)
    x[1] *= -1
    got, reference = _run(case, x, np.full((16, 512), code, np.uint8), np.full((16, 1), zero, np.uint8))
    np.testing.assert_allclose(got, reference, rtol=1e-6)


def test_activations_of_zero_and_tiny_ones():
    case = linear_case(4, 32, 64, 16, 3)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (16, 64), dtype=np.uint8)
    x = np.full((3, 64), 1e-40, np.float32)
    x[1] = rng.normal(size=64) * 1e-25
    x[2, 32:] = 1.0  # one group of zeros
    got, reference = _run(case, x, codes, rng.integers(0, 16, (16, 2), dtype=np.uint8))
    assert not got[0].any()
    np.testing.assert_allclose(got[1:], reference[1:], rtol=1e-3, atol=1e-28)


@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
def test_what_is_not_finite_stays_so(value):
    case = linear_case(4, 32, 64, 16, 1)
    x = np.ones((1, 64), np.float32)
    x[0, 40] = value
    got, _ = _run(case, x, np.full((16, 64), 9, np.uint8), np.full((16, 2), 8, np.uint8))
    assert not np.isfinite(got).any()


def test_is_chosen_for_a_few_rows_of_float32_alone():
    assert select(linear_case(4, 128, 256, 64, 1), CPU).kernel is KERNELS[0]
    for case in (linear_case(4, 128, 256, 64, None), linear_case(4, 128, 256, 64, 9), linear_case(4, 8, 256, 64, 1),
                 linear_case(4, 128, 256, 64, 1, dtype="float16")):  # fmt: skip
        selection = select(case, CPU)
        assert selection.kernel.name != KERNELS[0].name
        assert KERNELS[0].name in dict(selection.refused)
