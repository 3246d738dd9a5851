# SPDX-License-Identifier: Apache-2.0
"""Every rung below plain GPTQ: reached, reported, and still a usable quantization."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.factor import factorize
from gptq_compile.passes.gptq.rtn import rtn
from gptq_compile.passes.gptq.solver import solve

CONFIG = QuantizeConfig(mse=False, group_size=16, act_order=False, static_groups=False)


def gram(k: int, tokens: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 2 / tokens * x.t() @ x


def weights(n: int, k: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", [False, True])
def test_factor_is_the_upper_cholesky_factor_of_the_inverse(dtype: torch.dtype, order: bool) -> None:
    h = gram(40, 400)
    factor = factorize(h.to(dtype), 0.01, order)
    assert factor.upper is not None
    assert factor.reason is None
    mean = h.diagonal().mean()
    normal = (h / mean).numpy() + 0.01 * np.eye(40)
    if factor.order is not None:
        normal = normal[factor.order][:, factor.order]
        assert (np.diff(h.diagonal()[factor.order].numpy()) <= 0).all()
    want = np.linalg.cholesky(np.linalg.inv(normal)).T
    np.testing.assert_allclose(factor.upper.numpy(), want, rtol=2e-4, atol=2e-5)


def test_rung_float64() -> None:
    h = gram(32, 400)
    h[:, 1] = h[:, 0] * (1 + 1e-9)
    h[1, :] = h[0, :] * (1 + 1e-9)
    h[1, 1] = h[0, 0] * (1 + 1e-7)
    factor = factorize(h, 1e-12)
    assert factor.upper is not None
    assert factorize(h.float(), 0.01).reason is None
    assert factorize(h.float().double().float(), 1e-9).reason is not None


def test_rung_float64_keeps_the_damping() -> None:
    # Rank 8 and exact in float32: damping 1e-6 is below float32's noise, and enough in float64.
    x = torch.randint(-3, 4, (8, 32), generator=torch.Generator().manual_seed(2)).float()
    h = x.t() @ x
    factor = factorize(h, 1e-6)
    assert factor.damp == 1e-6
    assert factor.reason == "ill-conditioned: factored in float64"


def test_rung_more_damping() -> None:
    h = gram(32, 64)
    lowest = float(torch.linalg.eigvalsh(h)[0])
    h -= (lowest + 0.05 * float(h.diagonal().mean())) * torch.eye(32, dtype=h.dtype)
    stats = solve(weights(8, 32), h, replace(CONFIG, damp=0.01)).stats
    assert stats.damp == pytest.approx(0.1)
    assert stats.reason is not None
    assert "damping raised to 0.1" in stats.reason


def test_rung_diagonal_floor() -> None:
    sign = torch.randint(0, 2, (32, 32), generator=torch.Generator().manual_seed(3)).double() * 2 - 1
    h = torch.triu(sign, 1)
    h = h + h.t() + torch.eye(32)
    factor = factorize(h, 0.01)
    assert factor.upper is not None
    assert factor.reason is not None
    assert "row dominance" in factor.reason
    solution = solve(weights(8, 32), h, CONFIG)
    assert torch.isfinite(solution.weight).all()
    assert solution.stats.objective <= solution.stats.objective_rtn


def test_rung_round_to_nearest() -> None:
    w = weights(8, 32)
    want = rtn(w, CONFIG)
    hopeless = torch.full((32, 32), -1e307, dtype=torch.float64)  # row sums overflow
    hopeless.fill_diagonal_(1.0)
    broken = torch.eye(32)
    broken[3, 4] = float("nan")
    for h, why in (
        (torch.zeros(32, 32), "Hessian is zero"),
        (broken, "not finite"),
        (torch.full((32, 32), float("inf")), "not finite"),
        (hopeless, "no positive definite"),
    ):
        solution = solve(w, h, CONFIG)
        assert solution.stats.method == "rtn"
        assert solution.stats.reason is not None
        assert why in solution.stats.reason
        assert torch.equal(solution.codes, want.codes)
        assert torch.equal(solution.scales, want.scales)


def test_dominance_without_margin_is_factored() -> None:
    laplacian = torch.full((32, 32), -1e15)
    laplacian.fill_diagonal_(1.0)
    factor = factorize(laplacian, 0.01)
    assert factor.upper is not None
    assert factor.reason is not None
    assert "row dominance" in factor.reason


@pytest.mark.parametrize(("order", "static"), [(False, False), (True, True), (True, False)])
def test_dead_columns_keep_rounded_weights_and_do_not_widen_grids(order: bool, static: bool) -> None:
    dead = [3, 17, 18, *range(32, 48)]  # 32..47 is a whole group
    h = gram(48, 400)
    h[dead] = 0
    h[:, dead] = 0
    w = weights(8, 48)
    w[:, 3] = 5.0  # an outlier nobody multiplies with
    config = QuantizeConfig(mse=False, group_size=16, act_order=order, static_groups=static)
    solution = solve(w, h, config)
    assert solution.stats.dead_columns == len(dead)
    assert solution.stats.reason is not None
    assert solution.stats.reason.endswith(f"{len(dead)} dead columns rounded to nearest")
    assert float(solution.scales.max()) < 0.1
    step = solution.scales[:, solution.g_idx.long()] if solution.g_idx is not None else None
    if step is None:
        step = solution.scales.repeat_interleave(16, 1)
    error = (solution.weight - w).abs()
    assert (error[:, 32:48] <= step[:, 32:48] / 2 * (1 + 1e-6)).all()
    assert solution.stats.relative_error < solution.stats.relative_error_rtn


def test_dead_columns_do_not_disturb_the_others() -> None:
    h = gram(48, 400)
    alive = [k for k in range(48) if k not in (5, 40)]
    for dead in (5, 40):
        h[dead] = 0
        h[:, dead] = 0
    config = QuantizeConfig(mse=False, group_size=-1, act_order=False, static_groups=False)
    w = weights(8, 48)
    w[:, [5, 40]] = 0.0
    full = solve(w, h, config)
    reduced = solve(w[:, alive], h[alive][:, alive], config)
    assert torch.equal(full.codes[:, alive], reduced.codes)


def test_rows_where_rounding_is_better_keep_it() -> None:
    """Greedy compensation loses to rounding for some rows; those keep their rounded codes."""
    kept = 0
    for seed in range(6):
        w, h = weights(64, 8, seed), gram(8, 100, seed)
        config = QuantizeConfig(mse=False, wbits=2, group_size=-1, act_order=False, static_groups=False)
        solution, rounded = solve(w, h, config), rtn(w, config)
        assert solution.row_errors is not None
        rows = solution.row_errors.from_rtn
        kept += int(rows.sum())
        assert solution.stats.rtn_rows == int(rows.sum())
        assert torch.equal(solution.codes[rows], rounded.codes[rows])
        error = (w - solution.weight).double()
        direct = torch.einsum("nk,kj,nj->n", error, h, error)
        assert torch.allclose(direct, solution.row_errors.objective, rtol=1e-4, atol=1e-9)
        if solution.stats.rtn_rows:
            assert solution.stats.reason is not None
            assert f"kept in {solution.stats.rtn_rows} of 64 rows" in solution.stats.reason
    assert kept > 0


def test_whole_linear_falls_back_when_groups_are_permuted() -> None:
    config = QuantizeConfig(mse=False, wbits=2, group_size=4, act_order=True, static_groups=False)
    methods = set()
    for seed in range(40):
        w, h = weights(1, 8, seed), gram(8, 100, seed)
        solution = solve(w, h, config)
        methods.add(solution.stats.method)
        assert solution.stats.objective <= solution.stats.objective_rtn
        if solution.stats.method == "rtn":
            assert solution.g_idx is None
            assert torch.equal(solution.codes, rtn(w, config).codes)
    assert methods == {"gptq", "rtn"}


def test_method_rtn_is_measured_on_the_hessian() -> None:
    w, h = weights(8, 32), gram(32, 200)
    config = QuantizeConfig(mse=False, method="rtn", group_size=16)
    solution = solve(w, h, config)
    assert torch.equal(solution.codes, rtn(w, config).codes)
    assert solution.stats.method == "rtn"
    assert solution.stats.reason is None
    error = (w - solution.weight).double()
    assert solution.stats.objective == pytest.approx(float(((error @ h) * error).sum()), rel=1e-4)
