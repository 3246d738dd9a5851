# SPDX-License-Identifier: Apache-2.0
"""diag(R H R^T): how large an error is under a Hessian. It is most of a solve's arithmetic on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_compile.passes.gptq.halves import Halves, add_dots, by_rows, halves, scaled_product

_CHUNK = 4096  # rows, and columns of the Hessian, of one product on a GPU: bounds the temporaries
_SPLIT_FROM = 1024  # columns from which a GPU takes the product apart


def row_quadratic(rows: Tensor, hessian: Tensor, scale: float, rough: bool = False) -> Tensor:
    """diag(R H R^T) * scale as f64[N], for R f32[N, K] and symmetric H f32[K, K].

    Args:
        rows: R.
        hessian: H.
        scale: a factor.
        rough: three digits will do.
    """
    if rows.is_cuda and hessian.dtype == torch.float32 and hessian.shape[0] >= _SPLIT_FROM:
        return _split(rows, hessian, rough) * scale
    return (rows @ hessian).mul_(rows).sum(1, dtype=torch.float64) * scale


def _split(rows: Tensor, hessian: Tensor, rough: bool = False) -> Tensor:
    """The same by `halves`; with ``rough`` only of their larger parts.

    Since H is symmetric, only blocks on and above the diagonal are multiplied; those above count twice.
    """
    k = hessian.shape[0]
    result = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
    _, exponent = torch.frexp(hessian.diagonal().max())  # no element of a semidefinite matrix is larger
    unit = torch.ldexp(torch.ones_like(hessian[0, 0]), 8 - exponent)
    left = by_rows(rows)
    for c in range(0, k, _CHUNK):
        d = min(c + _CHUNK, k)
        right = halves(hessian[:d, c:d], unit)
        right.high[:c] *= 2
        right.low[:c] *= 2
        for r in range(0, rows.shape[0], _CHUNK):
            part = slice(r, r + _CHUNK)
            some = Halves(left.high[part, :d], left.low[part, :d], left.units[part])
            add_dots(scaled_product(some, right, rough), rows[part, c:d], some.units, result[part])
    return result / unit
