# SPDX-License-Identifier: Apache-2.0
"""The fused CUDA kernels against the torch code they stand for; skipped where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from gptq_compile.errors import CalibrationError
from gptq_compile.passes.gptq import factor
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.factor import factorize
from gptq_compile.passes.gptq.grid import MAX_SCALE, MIN_SCALE, fit, fit_groups
from gptq_compile.passes.gptq.hessian import Hessian
from gptq_compile.passes.gptq.solver import solve

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


@pytest.mark.parametrize("n", [1, 31, 200])
@pytest.mark.parametrize(
    ("bits", "sym", "group", "order", "static"),
    [
        (4, False, 128, True, True),
        (4, True, 32, False, False),
        (3, False, -1, True, False),
        (2, False, 40, True, False),
        (8, False, 5, False, False),
    ],
)
def test_same_objective_as_on_the_cpu(n: int, bits: int, sym: bool, group: int, order: bool, static: bool) -> None:
    g = torch.Generator().manual_seed(n)
    w = torch.randn(n, 168, generator=g) * 0.05
    h = Hessian(168)
    h.add(torch.randn(600, 168, generator=g) @ torch.randn(168, 168, generator=g))
    config = QuantizeConfig(mse=False, wbits=bits, sym=sym, group_size=group, act_order=order, static_groups=static)
    cpu = solve(w, h.matrix(), config)
    gpu = solve(w.cuda(), h.matrix().cuda(), config)
    assert gpu.stats.objective == pytest.approx(cpu.stats.objective, rel=2e-2 if n == 1 else 3e-3)
    differing = (gpu.codes.cpu() != cpu.codes).any(1)
    assert int(differing.sum()) <= max(1, n // 20)


@pytest.mark.parametrize(("order", "static", "mse"), [(True, True, True), (False, False, False)])
def test_wide_weights_are_updated_on_tensor_cores(order: bool, static: bool, mse: bool) -> None:
    g = torch.Generator().manual_seed(1)
    w = torch.randn(200, 1400, generator=g) * 0.05 * torch.rand(200, 1, generator=g) ** 4
    h = Hessian(1400)
    h.add(torch.randn(3000, 1400, generator=g) @ (torch.randn(1400, 1400, generator=g) / 20 + torch.eye(1400)))
    config = QuantizeConfig(wbits=4, group_size=128, act_order=order, static_groups=static, mse=mse)
    cpu, gpu = solve(w, h.matrix(), config), solve(w.cuda(), h.matrix().cuda(), config)
    assert gpu.stats.objective == pytest.approx(cpu.stats.objective, rel=1e-3)
    assert gpu.stats.relative_error == pytest.approx(cpu.stats.relative_error, rel=2e-3)
    assert float((gpu.codes.cpu() != cpu.codes).float().mean()) < 0.01


@pytest.mark.parametrize("k", [512, 384, 40])
def test_an_update_is_nearly_as_exact_as_float32(k: int) -> None:
    from gptq_compile.passes.gptq.update_triton import subtract_product

    g = torch.Generator("cuda").manual_seed(k)
    upper = torch.randn(k, 700, generator=g, device="cuda") * torch.rand(700, generator=g, device="cuda") ** 6
    error = torch.randn(k, 333, generator=g, device="cuda") * 1e-9
    upper[:, 5] = 0
    work = torch.randn(700, 333, generator=g, device="cuda") * 1e-9
    exact = work.double() - upper.double().t() @ error.double()
    size = work.double().abs() + upper.double().abs().t() @ error.double().abs()
    subtract_product(work, upper, error)
    assert float(((work - exact).abs() / size).max()) < 2e-6


@pytest.mark.parametrize("sym", [False, True])
def test_ranges_equal_those_of_the_cpu(sym: bool) -> None:
    from gptq_compile.passes.gptq.grid_triton import fit_range_fused

    g = torch.Generator().manual_seed(0)
    work, alive = torch.randn(100, 77, generator=g), (torch.rand(100, generator=g) > 0.3).float()
    work[:, 3] = 0
    work[:, 4].abs_()
    scales, zeros = torch.empty(2, 77, device="cuda").unbind(0)
    fit_range_fused(work.cuda(), alive.cuda(), scales, zeros, 7, sym, (MIN_SCALE, MAX_SCALE))
    scale, zero = fit((work.t() * alive).unsqueeze(1), 3, sym)
    assert torch.equal(scales.cpu(), scale[:, 0]) and torch.equal(zeros.cpu(), zero[:, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_unusual_tokens_are_found_in_one_pass(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x, d = torch.randn(900, 300, generator=g).to(dtype), torch.rand(900, generator=g) * 5
    x[7, 3], x[400, 2], d[9], d[10] = float("nan"), float("-inf"), float("nan"), float("inf")
    cpu, gpu = (Hessian(300, device=device, drop_bad=True, gather=256) for device in ("cpu", "cuda"))
    for part in (slice(0, 600), slice(600, 900)):
        cpu.add(x[part], d[part])
        gpu.add(x[part].cuda(), d[part].cuda())
    assert (gpu.tokens, gpu.dropped) == (cpu.tokens, cpu.dropped) == (896, 4)
    expected = cpu.matrix()
    size = expected.diagonal().sqrt()
    assert float(((gpu.matrix().cpu() - expected) / size / size[:, None]).abs().max()) < 1e-3
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        Hessian(300, device="cuda").add(x.cuda())
    large = Hessian(300, device="cuda")
    large.add((torch.randn(50, 300, generator=g) * 1e4).to(dtype).cuda(), torch.full((50,), 1e3, device="cuda"))
    assert bool(torch.isfinite(large.matrix()).all())  # beyond float16 once weighted


def test_16_bit_activations_are_multiplied_exactly() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
        cpu, gpu = Hessian(64, torch.float64), Hessian(64, device="cuda")
        cpu.add(x)
        gpu.add(x.cuda())
        torch.testing.assert_close(gpu.matrix().cpu().double(), cpu.matrix(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("bits", "sym", "group"), [(4, False, 128), (3, True, -1), (2, False, 40)])
def test_searched_grids_equal_those_of_the_cpu(weighted: bool, bits: int, sym: bool, group: int) -> None:
    g = torch.Generator().manual_seed(group)
    w, importance = torch.randn(50, 3000, generator=g) * 0.05, torch.rand(3000, generator=g) if weighted else None
    cpu = fit_groups(w, bits, sym, group, True, importance)
    gpu = fit_groups(w.cuda(), bits, sym, group, True, None if importance is None else importance.cuda())
    assert float((gpu.scales.cpu() != cpu.scales).float().mean()) < 0.01  # ties only


def test_large_hessians_are_factored_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(9000, 3000, generator=torch.Generator().manual_seed(0))
    h = Hessian(3000, device="cuda")
    h.add(x.cuda())
    expected = factorize(h.matrix().cpu(), act_order=True).upper
    for limit in (factor.HUGE, 1000):
        monkeypatch.setattr(factor, "HUGE", limit)
        got = factorize(h.matrix(), act_order=True).upper
        assert expected is not None and got is not None
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-3, atol=1e-4)
