# SPDX-License-Identifier: Apache-2.0
"""The column loop's update of all weights behind a block, W -= U^T E, on tensor cores.

A float32 product takes neither tensor cores nor, with so few columns to sum over, much of the rate without them. Here
both factors are pairs of float16 numbers: each column is scaled by a power of two to below 2^8 first, so that a pair
leaves away less than 2^-21 of the column's largest element. hi * hi + hi * lo + lo * hi are summed in float32, as
tensor cores do it: measured within 2^-20 of the sum of the magnitudes, where a float32 product is within 2^-22.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_STRIP = 16  # columns of a program that splits
_M, _N, _K = 128, 128, 64  # of a program's product


@triton.jit
def _split_columns_kernel(
    x, high, low, back, k, columns, stride, K: tl.constexpr, STRIP: tl.constexpr
):  # fmt: skip
    c = tl.program_id(0) * STRIP + tl.arange(0, STRIP)
    r = tl.arange(0, K)
    live = (r < k)[:, None] & (c < columns)[None, :]
    v = tl.load(x + r.to(tl.int64)[:, None] * stride + c[None, :], mask=live, other=0.0)
    exponent = (tl.max(tl.abs(v), axis=0).to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(261 - exponent, 1), 253)  # of the unit that scales the largest to [2^7, 2^8)
    v = v * (exponent << 23).to(tl.float32, bitcast=True)[None, :]
    h = v.to(tl.float16)
    at = r.to(tl.int64)[:, None] * columns + c[None, :]
    tl.store(high + at, h, mask=live)
    tl.store(low + at, (v - h.to(tl.float32)).to(tl.float16), mask=live)
    tl.store(back + c, ((254 - exponent) << 23).to(tl.float32, bitcast=True), mask=c < columns)


@triton.jit
def _update_kernel(
    work, a_high, a_low, a_back, b_high, b_low, b_back, m, n, k, stride,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    # Programs that run at the same time share rows of one factor.
    i = tl.program_id(0) % tl.cdiv(m, M)
    j = tl.program_id(0) // tl.cdiv(m, M)
    r = i * M + tl.arange(0, M)
    c = j * N + tl.arange(0, N)
    z = tl.arange(0, K)
    total = tl.zeros([M, N], tl.float32)
    for begin in range(0, k, K):
        at = begin + z
        a_mask, b_mask = (at < k)[:, None] & (r < m)[None, :], (at < k)[:, None] & (c < n)[None, :]
        a_at = at.to(tl.int64)[:, None] * m + r[None, :]
        b_at = at.to(tl.int64)[:, None] * n + c[None, :]
        ah = tl.trans(tl.load(a_high + a_at, mask=a_mask, other=0.0))
        al = tl.trans(tl.load(a_low + a_at, mask=a_mask, other=0.0))
        bh = tl.load(b_high + b_at, mask=b_mask, other=0.0)
        bl = tl.load(b_low + b_at, mask=b_mask, other=0.0)
        total = tl.dot(ah, bh, total)
        total = tl.dot(ah, bl, total)
        total = tl.dot(al, bh, total)
    back = tl.load(a_back + r, mask=r < m, other=0.0)[:, None] * tl.load(b_back + c, mask=c < n, other=0.0)[None, :]
    at = work + r.to(tl.int64)[:, None] * stride + c[None, :]
    live = (r < m)[:, None] & (c < n)[None, :]
    tl.store(at, tl.load(at, mask=live, other=0.0) - total * back, mask=live)


def _split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    k, columns = x.shape
    high, low = (torch.empty(k, columns, dtype=torch.float16, device=x.device) for _ in range(2))
    back = torch.empty(columns, device=x.device)
    _split_columns_kernel[(triton.cdiv(columns, _STRIP),)](
        x, high, low, back, k, columns, x.stride(0), K=triton.next_power_of_2(k), STRIP=_STRIP, num_warps=8
    )
    return high, low, back


def subtract_product(work: Tensor, upper: Tensor, error: Tensor) -> None:
    """work -= upper^T error.

    Args:
        work: f32[M, N], rows contiguous.
        upper: f32[P, M], rows contiguous, P at most `columns.BLOCK`.
        error: f32[P, N], rows contiguous.
    """
    (m, n), k = work.shape, upper.shape[0]
    assert upper.stride(1) == 1 and (n == 1 or work.stride(1) == error.stride(1) == 1)
    with _on(work):
        a, b = _split(upper), _split(error)
        _update_kernel[(triton.cdiv(m, _M) * triton.cdiv(n, _N),)](
            work, *a, *b, m, n, k, work.stride(0), M=_M, N=_N, K=_K, num_warps=8, num_stages=3
        )


def _on(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()  # not CUDA: Triton's interpreter
