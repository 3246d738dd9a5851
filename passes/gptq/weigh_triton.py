# SPDX-License-Identifier: Apache-2.0
"""What a Hessian needs of 16-bit activations before their product, in one pass over them on a GPU: weighted tokens
z_t = sqrt(d_t) x_t, and the range of each column."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 512  # of one program
_ROWS, _COLUMNS = 8, 256  # of a tile


@triton.jit
def _lower(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _higher(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _weigh_kernel(
    x, weights, out, low, high, tokens, features, stride,
    WEIGHTED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    strip = tl.program_id(1)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < features
    smallest = tl.full([ROWS, COLUMNS], float("inf"), tl.float32)
    largest = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    for begin in range(0, TOKENS, 2 * ROWS):
        t = strip * TOKENS + begin + tl.arange(0, ROWS)
        u = t + ROWS
        at, bt = t.to(tl.int64)[:, None], u.to(tl.int64)[:, None]
        a_mask, b_mask = (t < tokens)[:, None] & inside[None, :], (u < tokens)[:, None] & inside[None, :]
        # Both loads before the first store: more is on its way at a time.
        a = tl.load(x + at * stride + c[None, :], mask=a_mask, other=0.0).to(tl.float32)
        b = tl.load(x + bt * stride + c[None, :], mask=b_mask, other=0.0).to(tl.float32)
        smallest = _lower(smallest, tl.where(a_mask, a, float("inf")))
        largest = _higher(largest, tl.where(a_mask, a, float("-inf")))
        smallest = _lower(smallest, tl.where(b_mask, b, float("inf")))
        largest = _higher(largest, tl.where(b_mask, b, float("-inf")))
        if WEIGHTED:
            a = a * tl.sqrt_rn(tl.load(weights + t, mask=t < tokens, other=0.0))[:, None]
            b = b * tl.sqrt_rn(tl.load(weights + u, mask=u < tokens, other=0.0))[:, None]
        tl.store(out + at * features + c[None, :], a.to(out.dtype.element_ty), mask=a_mask)
        tl.store(out + bt * features + c[None, :], b.to(out.dtype.element_ty), mask=b_mask)
    tl.store(low + strip * features + c, tl.reduce(smallest, 0, _lower), mask=inside)
    tl.store(high + strip * features + c, tl.reduce(largest, 0, _higher), mask=inside)


def weigh(x: Tensor, weights: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor]:
    """Writes sqrt(d_t) x_t, rounded to 16 bits.

    Args:
        x: [T, K] float16 or bfloat16, rows contiguous.
        weights: f32[T] token weights d >= 0, or None for 1.
        out: [T, K] in x's type, contiguous.

    Returns:
        f32[K] smallest and f32[K] largest element of each column of x; NaN where it holds one.
    """
    tokens, features = x.shape
    strips = triton.cdiv(tokens, _TOKENS)
    low, high = torch.empty(2, strips, features, device=x.device).unbind(0)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():  # not CUDA: Triton's interpreter
        _weigh_kernel[(triton.cdiv(features, _COLUMNS), strips)](
            x,
            x if weights is None else weights,
            out,
            low,
            high,
            tokens,
            features,
            x.stride(0),
            WEIGHTED=weights is not None,
            TOKENS=_TOKENS,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            num_warps=4,
        )
    return low.amin(0), high.amax(0)
