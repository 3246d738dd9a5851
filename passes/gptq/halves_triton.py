# SPDX-License-Identifier: Apache-2.0
"""Float32 matrices as pairs of float16 ones on a GPU, and what goes with products of such pairs, each in one pass."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048  # elements


@triton.jit
def _split_kernel(
    x, units, high, low, columns, stride, UNIT_ROWS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * TILE + tl.arange(0, TILE)
    live = c < columns
    v = tl.load(x + row * stride + c, mask=live, other=0.0)
    v = v * tl.load(units + row * UNIT_ROWS)
    h = v.to(tl.float16)
    tl.store(high + row * columns + c, h, mask=live)
    tl.store(low + row * columns + c, (v - h.to(tl.float32)).to(tl.float16), mask=live)


def split(x: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
    """x * units as the sum of two float16 matrices.

    Args:
        x: f32[N, K], rows contiguous.
        units: f32[N, 1] factors of the rows, or f32[] of all of it.

    Returns:
        The larger part f16[N, K], and what it leaves.
    """
    rows, columns = x.shape
    assert x.stride(1) == 1
    high, low = (torch.empty(rows, columns, dtype=torch.float16, device=x.device) for _ in range(2))
    with _on(x):
        _split_kernel[(rows, triton.cdiv(columns, _TILE))](
            x,
            units,
            high,
            low,
            columns,
            x.stride(0),
            UNIT_ROWS=int(units.dim() > 0),
            TILE=_TILE,
            num_warps=4,
        )
    return high, low


@triton.jit
def _dot_kernel(a, b, units, out, columns, stride_a, stride_b, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([TILE], tl.float32)
    for begin in range(0, columns, TILE):
        c = begin + tl.arange(0, TILE)
        live = c < columns
        total += tl.load(a + row * stride_a + c, mask=live, other=0.0) * tl.load(
            b + row * stride_b + c, mask=live, other=0.0
        )
    made = tl.sum(total.to(tl.float64), axis=0) / tl.load(units + row).to(tl.float64)
    tl.store(out + row, tl.load(out + row) + made)


def add_dots(a: Tensor, b: Tensor, units: Tensor, out: Tensor) -> None:
    """out += sum(a * b, axis 1) / units.

    Args:
        a: f32[N, K], rows contiguous. ``b``: likewise.
        units: f32[N, 1].
        out: f64[N].
    """
    rows, columns = a.shape
    assert a.stride(1) == b.stride(1) == 1
    with _on(a):
        _dot_kernel[(rows,)](a, b, units, out, columns, a.stride(0), b.stride(0), TILE=_TILE, num_warps=4)


def _on(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()  # not CUDA: Triton's interpreter
