# SPDX-License-Identifier: Apache-2.0
"""The blocked float32 solver against the explicit-inverse float64 reference."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_compile.errors import ConfigError, ModelError
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.grid import dequantize
from gptq_compile.passes.gptq.hessian import Hessian
from gptq_compile.passes.gptq.solver import prepare, solve
from tests.passes.gptq import reference

PLAIN = QuantizeConfig(mse=False, group_size=-1, act_order=False, static_groups=False)


def spectrum(k: int, condition: float, seed: int, rank: int | None = None) -> torch.Tensor:
    """A float64 Hessian with eigenvalues from 1 down to 1 / condition in a random basis."""
    g = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(k, k, generator=g, dtype=torch.float64))
    values = torch.logspace(0, -np.log10(condition), k, dtype=torch.float64)
    if rank is not None:
        values[rank:] = 0
    h = (basis * values) @ basis.t()
    return (h + h.t()) / 2


def weights(n: int, k: int, seed: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


def run_reference(w: torch.Tensor, h: torch.Tensor, config: QuantizeConfig) -> reference.Reference:
    return reference.gptq(
        w.double().numpy(),
        h.double().numpy(),
        config.wbits,
        config.group_size,
        config.sym,
        config.act_order,
        config.static_groups,
        config.damp,
    )


def compare(w: torch.Tensor, h: torch.Tensor, config: QuantizeConfig, same_codes: bool = True) -> None:
    ours, theirs = solve(w, h, config), run_reference(w, h, config)
    hn = h.double().numpy()
    got = reference.objective(w.numpy(), ours.weight.numpy(), hn)
    want = reference.objective(w.numpy(), theirs.weight, hn)
    if ours.stats.rtn_rows:
        assert got <= want * (1 + 1e-3)
    else:
        assert got == pytest.approx(want, rel=1e-3)
    assert ours.stats.objective == pytest.approx(got, rel=1e-3)
    if ours.g_idx is not None:
        np.testing.assert_array_equal(ours.g_idx.numpy(), theirs.g_idx)
    if same_codes:
        rows = ~ours.row_errors.from_rtn.numpy()  # type: ignore[union-attr]
        differing = (ours.codes.numpy()[rows] != theirs.codes[rows]).any(1)
        # A float32 tie may fall the other way and then changes the rest of its row.
        assert differing.sum() <= 1
        np.testing.assert_array_equal(ours.scales.numpy()[rows][~differing], theirs.scales[rows][~differing])


@pytest.mark.parametrize(
    ("bits", "sym", "group", "order", "static"),
    [
        (4, False, -1, False, False),
        (4, True, 16, False, False),
        (3, False, 16, True, False),
        (3, False, 16, True, True),
        (2, True, 32, True, True),
        (8, False, 40, False, True),
        (4, False, 40, False, False),
        (4, False, 1, True, True),
        (2, False, 7, True, False),
        (4, True, 96, True, False),
    ],
)
def test_codes_equal_the_reference(bits: int, sym: bool, group: int, order: bool, static: bool) -> None:
    config = QuantizeConfig(
        mse=False, wbits=bits, sym=sym, group_size=group, act_order=order, static_groups=static, block_size=32
    )
    compare(weights(24, 96, 1), spectrum(96, 100, 2), config)


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize(
    "h",
    [
        spectrum(64, 1e8, 3),
        spectrum(64, 1e2, 4, rank=20),
        spectrum(64, 1e4, 5) * 1e30,
        spectrum(64, 1e4, 6) * 1e-30,
    ],
    ids=["condition 1e8", "rank deficient", "huge", "tiny"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hard_hessians(h: torch.Tensor, order: bool, dtype: torch.dtype) -> None:
    config = QuantizeConfig(mse=False, group_size=16, act_order=order, static_groups=False)
    h = h.to(dtype)
    compare(weights(96, 64, 7), h, config, same_codes=False)
    assert solve(weights(4, 64, 7), h, config).stats.reason in (None, "ill-conditioned: factored in float64")


def test_hessian_scale_does_not_change_codes() -> None:
    w, h = weights(16, 48, 1), spectrum(48, 100, 1)
    config = replace(PLAIN, group_size=16)
    codes = [solve(w, h * 2.0**e, config).codes for e in (-100, 0, 100)]
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[1], codes[2])


def test_groups_of_one_column_fitted_in_the_loop() -> None:
    """Each weight gets its own scale, so all error is the scale's rounding: codes and scales are not compared."""
    w, h = weights(24, 96, 1), spectrum(96, 100, 2)
    config = replace(PLAIN, group_size=1, block_size=32)
    ours = solve(w, h, config).weight.numpy()
    theirs = run_reference(w, h, config).weight
    got, want = (reference.objective(w.numpy(), q, h.numpy()) for q in (ours, theirs))
    assert got == pytest.approx(want, rel=0.03)


@pytest.mark.parametrize("group", [-1, 5, 8, 24, 50, 64])
@pytest.mark.parametrize(("order", "static"), [(False, False), (True, False), (True, True)])
def test_blocked_equals_unblocked(group: int, order: bool, static: bool) -> None:
    w, h = weights(12, 72, 8), spectrum(72, 50, 9)
    config = QuantizeConfig(mse=False, group_size=group, act_order=order, static_groups=static, block_size=72)
    whole = solve(w, h, config)
    for block in (1, 13, 24, 1000):
        blocked = solve(w, h, replace(config, block_size=block))
        assert torch.equal(blocked.codes, whole.codes)
        assert torch.equal(blocked.scales, whole.scales)


def test_grids_see_updated_weights_inside_a_block() -> None:
    """The reference code fits the later groups of a block on stale weights; this solver must not."""
    w, h = weights(16, 64, 10), spectrum(64, 200, 11)
    solution = solve(w, h, replace(PLAIN, group_size=16, block_size=64))
    stale = torch.stack([w[:, g : g + 16].amax(1) - w[:, g : g + 16].amin(1) for g in range(0, 64, 16)], 1) / 15
    assert torch.allclose(solution.scales[:, 0], stale[:, 0], rtol=2e-3)
    assert not torch.allclose(solution.scales[:, 1:], stale[:, 1:], rtol=2e-2)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 6),
    k=st.integers(1, 40),
    group=st.integers(0, 40),
    block=st.integers(1, 50),
    bits=st.sampled_from([2, 3, 4, 8]),
    flags=st.tuples(*[st.booleans()] * 4),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    n: int, k: int, group: int, block: int, bits: int, flags: tuple[bool, bool, bool, bool], seed: int
) -> None:
    sym, order, static, mse = flags
    size = min(group, k) or -1
    config = QuantizeConfig(
        wbits=bits, group_size=size, sym=sym, act_order=order, static_groups=static, block_size=block, mse=mse
    )
    w, h = weights(n, k, seed), spectrum(k, 10, seed + 1)
    solution = solve(w, h, config)
    assert solution.codes.shape == (n, k)
    assert solution.codes.dtype == torch.uint8
    assert int(solution.codes.max()) <= config.max_code
    assert solution.scales.shape == (n, config.groups_in(k))
    assert torch.equal(solution.scales.half().float(), solution.scales)
    assert bool((solution.scales > 0).all())
    assert (solution.zeros is None) == sym
    g_idx = np.arange(k) // config.group_for(k) if solution.g_idx is None else solution.g_idx.numpy()
    zeros = np.full(solution.scales.shape, 2 ** (bits - 1)) if solution.zeros is None else solution.zeros.numpy()
    codes, scales = solution.codes.numpy().astype(np.float64), solution.scales.numpy().astype(np.float64)
    exact = scales[:, g_idx] * (codes - zeros[:, g_idx])
    np.testing.assert_array_equal(solution.weight.numpy().astype(np.float64), exact)
    assert solution.stats.objective <= solution.stats.objective_rtn
    if solution.g_idx is None:
        errors = solution.row_errors
        assert errors is not None
        assert (errors.objective <= errors.objective_rtn).all()
    if not mse:
        compare(w, h, config, same_codes=False)


def test_static_groups_need_no_index_and_act_order_does() -> None:
    w, h = weights(8, 64, 12), spectrum(64, 100, 13)
    base = QuantizeConfig(mse=False, group_size=16)
    static = solve(w, h, replace(base, static_groups=True))
    plain = solve(w, h, replace(base, static_groups=False))
    row = solve(w, h, replace(base, static_groups=False, group_size=-1))
    assert static.g_idx is None
    assert row.g_idx is None
    assert plain.g_idx is not None
    assert plain.g_idx.dtype == torch.int32
    assert torch.equal(plain.g_idx.bincount(), torch.full((4,), 16))
    rebuilt = dequantize(plain.codes, plain.scales, plain.zeros, plain.g_idx, 16, 4)
    assert torch.equal(rebuilt, plain.weight)


def test_gptq_beats_rounding_on_correlated_inputs() -> None:
    w, h = weights(64, 96, 14), spectrum(96, 1000, 15)
    for bits, order in itertools.product((2, 3, 4), (False, True)):
        stats = solve(w, h, QuantizeConfig(mse=False, wbits=bits, group_size=32, act_order=order)).stats
        assert stats.objective < 0.6 * stats.objective_rtn
        assert stats.relative_error == pytest.approx(
            stats.objective / reference.objective(w.numpy(), np.zeros_like(w.numpy()), h.numpy()), rel=1e-4
        )


def test_mse_grids_lower_the_objective_at_low_bits() -> None:
    w, h = weights(64, 96, 16), spectrum(96, 100, 17)
    config = QuantizeConfig(mse=False, wbits=2, group_size=32)
    assert solve(w, h, replace(config, mse=True)).stats.objective < 0.95 * solve(w, h, config).stats.objective


@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize("group", [-1, 16])
def test_act_order_is_the_natural_order_of_a_sorted_problem(group: int, mse: bool) -> None:
    w = weights(12, 48, 22)
    energy = torch.logspace(-1, 1, 48)[torch.randperm(48, generator=torch.Generator().manual_seed(24))]
    h = spectrum(48, 1e4, 23).float() * energy * energy[:, None]
    order = torch.argsort(h.diagonal(), descending=True)
    config = QuantizeConfig(wbits=3, group_size=group, static_groups=False, mse=mse)
    permuted = solve(w, h, replace(config, act_order=True))
    natural = solve(w[:, order], h[order][:, order], replace(config, act_order=False))
    rows = ~(permuted.row_errors.from_rtn | natural.row_errors.from_rtn)  # type: ignore[union-attr]
    assert int(rows.sum()) >= 6
    assert torch.equal(permuted.codes[:, order][rows], natural.codes[rows])
    assert torch.equal(permuted.scales[rows], natural.scales[rows])


def test_stacked_equals_separate() -> None:
    parts = [weights(n, 48, n) for n in (5, 9, 2)]
    h = Hessian(48)
    h.add(torch.randn(200, 48, generator=torch.Generator().manual_seed(0)))
    for order, static in ((True, True), (False, False)):
        config = QuantizeConfig(mse=False, group_size=16, act_order=order, static_groups=static)
        stacked = solve(torch.cat(parts), prepare(h, config), config).split([5, 9, 2])
        for part, got in zip(parts, stacked, strict=True):
            alone = solve(part, h, config)
            assert torch.equal(got.codes, alone.codes)
            assert torch.equal(got.scales, alone.scales)
            assert got.stats.objective == pytest.approx(alone.stats.objective, rel=1e-5)
            assert got.stats.relative_error_rtn == pytest.approx(alone.stats.relative_error_rtn, rel=1e-5)
        with pytest.raises(ValueError, match="15 rows"):
            solve(torch.cat(parts), h, config).split([5, 10])


def test_half_weights_and_input_untouched() -> None:
    w, h = weights(8, 32, 18), spectrum(32, 10, 19).float()
    before, h_before = w.clone(), h.clone()
    config = replace(PLAIN, group_size=8)
    solve(w, h, config)
    assert torch.equal(w, before)
    assert torch.equal(h, h_before)
    one_row = w[:1].clone()
    solve(one_row, h, config)
    assert torch.equal(one_row, w[:1])
    transposed = w.t().contiguous().t()  # as a Conv1D stores it
    assert torch.equal(solve(transposed, h, config).codes, solve(w, h, config).codes)
    assert torch.equal(transposed, w)
    half = solve(w.bfloat16(), h, config)
    assert torch.equal(half.codes, solve(w.bfloat16().float(), h, config).codes)


@pytest.mark.parametrize("magnitude", [1e-38, 1e-7, 1e30, 3e38])
def test_extreme_weights_stay_finite(magnitude: float) -> None:
    w, h = weights(8, 32, 20).sign() * magnitude, spectrum(32, 100, 21)
    for static in (False, True):
        solution = solve(w, h, QuantizeConfig(mse=False, group_size=8, act_order=False, static_groups=static))
        assert torch.isfinite(solution.weight).all()
        assert torch.isfinite(solution.scales).all()
        assert int(solution.codes.max()) <= 15


def test_bad_inputs_are_named() -> None:
    h = torch.eye(32)
    with pytest.raises(ConfigError, match=r"model\.q.*32 input features but group_size is 64"):
        solve(weights(4, 32, 0), h, QuantizeConfig(mse=False, group_size=64), name="model.q")
    with pytest.raises(ConfigError, match=r"model\.q.*Hessian has 32"):
        solve(weights(4, 48, 0), h, QuantizeConfig(mse=False, group_size=16), name="model.q")
    w = weights(4, 32, 0)
    w[2, 5] = float("nan")
    with pytest.raises(ModelError, match=r"model\.q.*row 2, column 5"):
        solve(w, h, QuantizeConfig(mse=False, group_size=16), name="model.q")
