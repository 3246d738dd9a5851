# SPDX-License-Identifier: Apache-2.0
"""The fused CUDA column loop against the torch one; skipped where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from gptq_compile.passes.gptq.config import QuantizeConfig
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
