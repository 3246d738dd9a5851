# SPDX-License-Identifier: Apache-2.0
"""The integer quant_linear of the CPU against float64 and at the ends of its number ranges."""

from __future__ import annotations

import numpy as np
import pytest

from gptq_compile.kernels.cpu.int16_linear import KERNELS
from gptq_compile.kernels.layouts import layout_for
from gptq_compile.kernels.registry import Case, select
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import tvm
from gptq_compile.kernels.words import Grouping

CPU = Target.parse("cpu")


def _case(bits, group, k, n, rows, zeros=True, bias=False, dtype="float32") -> Case:
    return Case.make(
        "quant_linear", dtype, rows, in_features=k, out_features=n, bits=bits, group_size=group,
        has_zeros=zeros, has_bias=bias,
    )  # fmt: skip


def _run(case: Case, x: np.ndarray, codes: np.ndarray, zeros: np.ndarray | None, seed: int = 0) -> tuple:
    """Returns (kernel output, float64 reference) with random scales and, where the case has one, a random bias."""
    rng = np.random.default_rng(seed)
    n, k, bits = case["out_features"], case["in_features"], case["bits"]
    grouping = Grouping.of(bits, k, case["group_size"])
    scales = (rng.uniform(0.5, 2.0, (n, grouping.groups)) / 100).astype(np.float16).astype(np.float32)
    bias = [rng.normal(size=n).astype(np.float32)] if case["has_bias"] else []
    zero = np.full(scales.shape, 1 << (bits - 1)) if zeros is None else zeros
    group = np.arange(k) // grouping.group_size
    weight = scales.astype(np.float64)[:, group] * (codes - zero.astype(np.float64)[:, group])
    with np.errstate(invalid="ignore"):
        reference = x.astype(np.float64) @ weight.T + sum(bias)
    library = tvm.compile(KERNELS[0].prim_func(case, CPU), target=CPU.tvm())
    out = tvm.runtime.tensor(np.full((len(x), n), np.nan, np.float32))
    packed = layout_for(case, CPU).pack(case, codes, scales, zeros)
    library["quant_linear"](*map(tvm.runtime.tensor, [x, *packed.values(), *bias]), out)
    return out.numpy(), reference


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize(
    ("group", "k", "n", "rows"), [(128, 576, 48, 1), (20, 130, 37, 3), (128, 300, 17, 8), (-1, 600, 16, 2)]
)
def test_matches_float64(bits, group, k, n, rows):
    case = _case(bits, group, k, n, rows, zeros=group != 128 or k == 576, bias=n % 2 == 1)
    rng = np.random.default_rng(bits * 1000 + k)
    codes = rng.integers(0, 1 << bits, (n, k), dtype=np.uint8)
    zeros = rng.integers(0, 1 << bits, (n, Grouping.of(bits, k, group).groups), dtype=np.uint8)
    x = rng.normal(size=(rows, k)).astype(np.float32)
    got, reference = _run(case, x, codes, zeros if case["has_zeros"] else None)
    assert np.sum((got - reference) ** 2) / np.sum(reference**2) < 5e-9


@pytest.mark.parametrize(("code", "zero"), [(255, 0), (0, 255), (255, 255)])
def test_the_largest_sums_do_not_wrap(code, zero):
    case = _case(8, -1, 512, 16, 2)
    x = np.full((2, 512), 3.0, np.float32)
    x[1] *= -1
    got, reference = _run(case, x, np.full((16, 512), code, np.uint8), np.full((16, 1), zero, np.uint8))
    np.testing.assert_allclose(got, reference, rtol=1e-6)


def test_activations_of_zero_and_tiny_ones():
    case = _case(4, 32, 64, 16, 3)
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
    case = _case(4, 32, 64, 16, 1)
    x = np.ones((1, 64), np.float32)
    x[0, 40] = value
    got, _ = _run(case, x, np.full((16, 64), 9, np.uint8), np.full((16, 2), 8, np.uint8))
    assert not np.isfinite(got).any()


def test_is_chosen_for_a_few_rows_of_float32_alone():
    assert select(_case(4, 128, 256, 64, 1), CPU).kernel is KERNELS[0]
    for case in (_case(4, 128, 256, 64, None), _case(4, 128, 256, 64, 9), _case(4, 8, 256, 64, 1),
                 _case(4, 128, 256, 64, 1, dtype="float16")):  # fmt: skip
        selection = select(case, CPU)
        assert selection.kernel.name != KERNELS[0].name
        assert KERNELS[0].name in dict(selection.refused)
