# SPDX-License-Identifier: Apache-2.0
"""The fused CUDA kernels against the torch code they stand for; skipped where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from gptq_compile.passes.gptq import factor
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.factor import factorize
from gptq_compile.passes.gptq.grid import fit_groups
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
