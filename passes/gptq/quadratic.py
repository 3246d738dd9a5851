# SPDX-License-Identifier: Apache-2.0
"""diag(R H R^T): how large an error is under a Hessian. It is most of a solve's arithmetic on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 4096  # rows, and columns of the Hessian, of one product on a GPU: bounds the temporaries
_SPLIT_FROM = 1024  # columns from which a GPU takes the product apart


def row_quadratic(rows: Tensor, hessian: Tensor, scale: float) -> Tensor:
    """diag(R H R^T) * scale as f64[N], for R f32[N, K] and symmetric H f32[K, K]."""
    if rows.is_cuda and hessian.dtype == torch.float32 and hessian.shape[0] >= _SPLIT_FROM:
        return _split(rows, hessian) * scale
    return (rows @ hessian).mul_(rows).sum(1, dtype=torch.float64) * scale


def _split(rows: Tensor, hessian: Tensor) -> Tensor:
    """The same with each factor as the sum of two float16 numbers, whose products are exact on tensor cores.

    Factors are scaled by powers of two to at most 2^8 first, so that what a pair leaves away is below 2^-21 of the
    row's (the matrix's) largest element: about what float32 itself would round. lo * lo is left away too. Since H is
    symmetric, only blocks on and above the diagonal are multiplied; those above count twice.
    """
    k = hessian.shape[0]
    result = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
    _, exponent = torch.frexp(hessian.diagonal().max())  # no element of a semidefinite matrix is larger
    unit = torch.ldexp(torch.ones_like(hessian[0, 0]), 8 - exponent)
    for r in range(0, rows.shape[0], _CHUNK):
        part = rows[r : r + _CHUNK]
        _, exponents = torch.frexp(part.abs().amax(1, keepdim=True))
        units = torch.ldexp(torch.ones_like(part[:, :1]), 8 - exponents)
        high, low = _halves(part * units)
        total = result[r : r + _CHUNK]
        for c in range(0, k, _CHUNK):
            d = min(c + _CHUNK, k)
            h_high, h_low = _halves(hessian[:d, c:d] * unit)
            h_high[:c] *= 2
            h_low[:c] *= 2
            product = _mm(high[:, :d], h_low)
            product += _mm(low[:, :d], h_high)
            product += _mm(high[:, :d], h_high)
            total += product.mul_(part[:, c:d]).sum(1, dtype=torch.float64) / units[:, 0]
    return result / unit


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    high = x.half()
    return high, x.sub_(high).half()


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """Float32 product of float16 matrices."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
