# SPDX-License-Identifier: Apache-2.0
"""Float32 products of matrices on a GPU's tensor cores.

Each factor is the sum of two float16 numbers, whose products are exact and summed in float32. Factors are scaled by
powers of two to below 2^8 first, so that what a pair leaves away is below 2^-21 of the largest element that shares the
power. Of the four products that of the two smaller parts is left away too.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Halves:
    """x * units = high + low.

    Attributes:
        high: f16, the larger part. ``low``: f16, what it leaves.
        units: powers of two, f32, that broadcast against x.
    """

    high: Tensor
    low: Tensor
    units: Tensor


def by_rows(x: Tensor) -> Halves:
    """A left factor f32[N, K], each row scaled by itself."""
    _, exponents = torch.frexp(torch.linalg.vector_norm(x, float("inf"), dim=1, keepdim=True))
    return halves(x, torch.ldexp(torch.ones_like(x[:, :1]), 8 - exponents))


def halves(x: Tensor, units: Tensor) -> Halves:
    """A matrix f32[N, K] with units f32 [N, 1] or []."""
    if x.is_cuda and x.stride(1) == 1 and (fused := _fused()) is not None:
        high, low = fused.split(x, units)
        return Halves(high, low, units)
    x = x * units
    high = x.half()
    return Halves(high, x.sub_(high).half(), units)


def scaled_product(a: Halves, b: Halves, rough: bool = False) -> Tensor:
    """The f32 product of the scaled factors; ``rough``: of their larger parts only."""
    result = torch.mm(a.high, b.high, out_dtype=torch.float32) if a.high.is_cuda else a.high.float() @ b.high.float()
    if not rough:
        _add_mm(result, a.high, b.low)
        _add_mm(result, a.low, b.high)
    return result


def add_dots(a: Tensor, b: Tensor, units: Tensor, out: Tensor) -> None:
    """out[n] += sum(a[n] * b[n]) / units[n], f64; ``a`` f32[N, K] is used up."""
    if a.is_cuda and a.stride(1) == b.stride(1) == 1 and (fused := _fused()) is not None:
        fused.add_dots(a, b, units, out)
    else:
        out += a.mul_(b).sum(1, dtype=torch.float64) / units[:, 0]


@functools.cache
def _fused() -> ModuleType | None:
    """One-pass CUDA versions of what surrounds the products, or None without Triton."""
    try:
        from gptq_compile.passes.gptq import halves_triton
    except ImportError as error:
        log.warning("Triton cannot be imported (%s); solving is slower without.", error)
        return None
    return halves_triton


def _add_mm(into: Tensor, a: Tensor, b: Tensor) -> None:
    if a.is_cuda:
        torch.ops.aten.addmm.dtype_out(into, a, b, torch.float32, out=into)
    else:
        into.addmm_(a.float(), b.float())
