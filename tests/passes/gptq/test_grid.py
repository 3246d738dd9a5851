# SPDX-License-Identifier: Apache-2.0
"""Grids: float16-exact scales, covered ranges, the reference quantizer's min-max, and the clipping search."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.grid import MAX_SCALE, MIN_SCALE, dequantize, fit, fit_groups, to_fp16_nearest, to_fp16_up
from gptq_compile.passes.gptq.rtn import rtn
from tests.passes.gptq import reference


def weights(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


@given(st.floats(0, 2.0**126, width=32))
def test_fp16_up_is_the_next_float16(value: float) -> None:
    up = float(to_fp16_up(torch.tensor([value]))[0])
    assert float(np.float16(up)) == up
    assert MIN_SCALE <= up <= MAX_SCALE
    if value <= MAX_SCALE:
        assert up >= value
        below = float(np.nextafter(np.float16(up), np.float16(0)))
        assert below < value or up == MIN_SCALE


def test_fp16_nearest_stays_finite_and_positive() -> None:
    got = to_fp16_nearest(torch.tensor([0.0, 1e-30, 1.0, 65519.0, 1e38, math.inf]))
    assert got.tolist() == [MIN_SCALE, MIN_SCALE, 1.0, MAX_SCALE, MAX_SCALE, MAX_SCALE]


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.floats(-1e5, 1e5, width=32, allow_subnormal=False), min_size=5, max_size=5),
        min_size=1,
        max_size=4,
    ),
    bits=st.sampled_from([2, 3, 4, 8]),
    sym=st.booleans(),
    group=st.sampled_from([-1, 1, 2, 3, 5]),
)
def test_every_weight_is_within_half_a_step(rows: list[list[float]], bits: int, sym: bool, group: int) -> None:
    w = torch.tensor(rows)
    grid = fit_groups(w, bits, sym, group)
    codes = grid.quantize(w)
    assert int(codes.max()) < 2**bits
    assert torch.equal(grid.scales.half().float(), grid.scales)
    assert bool((grid.scales > 0).all())
    step = grid.scales.repeat_interleave(grid.group_size, 1)[:, :5].double()
    error = (grid.dequantize(codes).double() - w.double()).abs()
    # 1e5 over 3 steps exceeds float16's largest scale only for symmetric 2-bit grids, where 1e5 * 2 / 3 > 65504.
    covered = step < MAX_SCALE
    assert bool((error <= step / 2 * (1 + 1e-6))[covered].all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("group", [-1, 7, 16, 40])
def test_minmax_equals_the_float64_reference(bits: int, sym: bool, group: int) -> None:
    w = weights(9, 40)
    w[0] = w[0].abs()  # range must still include 0
    w[1] = -w[1].abs()
    w[2] = 0
    grid = fit_groups(w, bits, sym, group)
    size = 40 if group == -1 else group
    for g in range(grid.scales.shape[1]):
        scale, zero = reference.grids(w[:, g * size : (g + 1) * size].double().numpy(), bits, sym)
        np.testing.assert_array_equal(grid.scales[:, g].numpy(), scale)
        if grid.zeros is None:
            assert sym
        else:
            np.testing.assert_array_equal(grid.zeros[:, g].numpy(), zero)
    solution = rtn(w, QuantizeConfig(mse=False, wbits=bits, sym=sym, group_size=group))
    zeros = np.full(grid.scales.shape, 2.0 ** (bits - 1)) if grid.zeros is None else grid.zeros.numpy()
    g_idx = np.arange(40) // size
    scales = grid.scales.double().numpy()[:, g_idx]
    want = np.clip(np.rint(w.double().numpy() / scales) + zeros[:, g_idx], 0, 2**bits - 1)
    np.testing.assert_array_equal(solution.codes.numpy(), want)
    assert torch.equal(solution.weight[2], torch.zeros(40))


@pytest.mark.parametrize("magnitude", [0.0, 1e-38, 1e-30, 1e-8, 1e-6, 1e5, 1e30, 3e38])
@pytest.mark.parametrize("sym", [False, True])
def test_extreme_weights_give_finite_grids(magnitude: float, sym: bool) -> None:
    w = torch.linspace(-1, 1, 16).repeat(2, 1) * magnitude
    solution = rtn(w, QuantizeConfig(mse=False, group_size=8, sym=sym))
    assert torch.isfinite(solution.weight).all()
    assert bool((solution.scales > 0).all())
    assert torch.equal(solution.scales.half().float(), solution.scales)
    if magnitude <= 1e5:
        assert float((solution.weight - w).abs().max()) <= max(0.51 * float(solution.scales.max()), 0)


def test_mse_never_loses_on_its_own_criterion() -> None:
    w = weights(40, 64)
    w[:, ::17] *= 6  # outliers worth clipping
    importance = torch.linspace(0.1, 2, 64)
    importance[::17] = 0.01
    for bits, sym in ((2, False), (3, True), (4, False)):
        for weight_of in (None, importance):
            errors = []
            for mse in (False, True):
                grid = fit_groups(w, bits, sym, 16, mse, weight_of)
                error = (grid.dequantize(grid.quantize(w)) - w).abs().double()
                power = error**2.4 if weight_of is None else error**2 * weight_of
                errors.append(power.unflatten(1, (4, 16)).sum(2))
            assert (errors[1] <= errors[0] * (1 + 1e-4) + 1e-9).all()
            assert errors[1].sum() < 0.97 * errors[0].sum()


def test_mse_finds_the_best_shrink_of_the_reference_grid() -> None:
    w = weights(3, 32, 5)
    w[:, 0] *= 4
    scale, zero = (t.flatten() for t in fit(w.unsqueeze(1), 3, False, mse=True))
    for r in range(3):
        row = w[r].double().numpy()
        low, high = min(row.min(), 0), max(row.max(), 0)
        best = math.inf
        for i in range(80):
            p = 1 - i / 100
            s = float(np.float16(p * (high - low) / 7)) if i else reference.fp16_up((high - low) / 7)
            z = np.clip(np.rint(-p * low / s), 0, 7)
            q = s * (np.clip(np.rint(row / s) + z, 0, 7) - z)
            best = min(best, float((np.abs(q - row) ** 2.4).sum()))
        s, z = float(scale[r]), float(zero[r])
        q = s * (np.clip(np.rint(row / s) + z, 0, 7) - z)
        assert float((np.abs(q - row) ** 2.4).sum()) == pytest.approx(best, rel=1e-4)


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 5),
    k=st.integers(1, 30),
    size=st.integers(-1, 30),
    bits=st.sampled_from([2, 3, 4, 8]),
    seed=st.integers(0, 99),
    permuted=st.booleans(),
    sym=st.booleans(),
)
def test_dequantize_is_exact(n: int, k: int, size: int, bits: int, seed: int, permuted: bool, sym: bool) -> None:
    rng = np.random.default_rng(seed)
    size = min(size, k) or -1
    width = k if size == -1 else size
    count = -(-k // width)
    codes = rng.integers(0, 2**bits, (n, k), dtype=np.uint8)
    scales = rng.lognormal(-3, 4, (n, count)).clip(6e-8, 6e4).astype(np.float16)
    zeros = rng.integers(0, 2**bits, (n, count), dtype=np.uint8)
    g_idx = np.arange(k) // width
    if permuted:
        g_idx = rng.permutation(g_idx)
    got = dequantize(
        torch.from_numpy(codes),
        torch.from_numpy(scales).float(),
        None if sym else torch.from_numpy(zeros),
        torch.from_numpy(g_idx).int() if permuted else None,
        size,
        bits,
    )
    zero = np.full(zeros.shape, 2.0 ** (bits - 1)) if sym else zeros.astype(np.float64)
    want = scales.astype(np.float64)[:, g_idx] * (codes.astype(np.float64) - zero[:, g_idx])
    np.testing.assert_array_equal(got.double().numpy(), want)
