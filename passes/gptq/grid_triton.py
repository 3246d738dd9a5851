# SPDX-License-Identifier: Apache-2.0
"""The search for clipped grids as one CUDA kernel: a tile of a group's weights stays in registers for all 80 tries.

Operation by operation, every try reads and writes the weight several times: 9 s of an H200 for eight billion weights.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048  # elements of a program's tile


@triton.jit
def _tile_error(w, importance, scale, zero, top, WEIGHTED: tl.constexpr, NORM: tl.constexpr):
    """Summed error over the columns of a tile [R, C] on grids [R]."""
    # The reciprocal can move a tie to its other neighbour, which is as far away.
    steps = w * (1.0 / scale)[:, None]
    steps = tl.minimum(tl.maximum(steps, -zero[:, None]), top - zero[:, None])
    steps = (steps + 12582912.0) - 12582912.0  # rounds half to even, see columns_triton
    error = steps * scale[:, None] - w
    if WEIGHTED:
        return tl.sum(error * error * importance[None, :], axis=1)
    return tl.sum(tl.where(error == 0, 0.0, tl.exp2(NORM * tl.log2(tl.abs(error)))), axis=1)


@triton.jit
def _search_kernel(
    weight, importance, exact, low, scale, zero, rows, groups, columns, stride_row, stride_group,
    tries, shrink_steps, top, smallest, largest,
    SYM: tl.constexpr, WEIGHTED: tl.constexpr, NORM: tl.constexpr, SINGLE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) % groups
    r = (tl.program_id(0) // groups) * ROWS + tl.arange(0, ROWS)
    live = r < rows
    at = r * groups + group
    full = tl.load(exact + at, mask=live, other=1.0)
    bottom = tl.load(low + at, mask=live, other=0.0)
    best_scale = tl.load(scale + at, mask=live, other=1.0)
    best_zero = tl.load(zero + at, mask=live, other=0.0)
    start = weight + r.to(tl.int64)[:, None] * stride_row + group.to(tl.int64) * stride_group
    c = tl.arange(0, COLUMNS)
    tile_importance = tl.full([COLUMNS], 1.0, tl.float32)
    tile = tl.zeros([ROWS, COLUMNS], tl.float32)
    if SINGLE:
        tile = tl.load(start + c[None, :], mask=live[:, None] & (c < columns)[None, :], other=0.0)
        if WEIGHTED:
            tile_importance = tl.load(importance + group * columns + c, mask=c < columns, other=0.0)
    best = tl.full([ROWS], float("inf"), tl.float32)
    for i in range(tries):
        p = 1.0 - i / shrink_steps
        s, z = best_scale, best_zero
        if i > 0:
            s = tl.minimum(tl.maximum(full * p, smallest), largest).to(tl.float16).to(tl.float32)
            if not SYM:
                z = tl.minimum(tl.maximum(tl.div_rn(-bottom * p, s), 0.0), top)
                z = (z + 12582912.0) - 12582912.0
        error = tl.zeros([ROWS], tl.float32)
        if SINGLE:
            error = _tile_error(tile, tile_importance, s, z, top, WEIGHTED, NORM)
        else:
            for begin in range(0, columns, COLUMNS):
                k = begin + c
                part = tl.load(start + k[None, :], mask=live[:, None] & (k < columns)[None, :], other=0.0)
                if WEIGHTED:
                    tile_importance = tl.load(importance + group * columns + k, mask=k < columns, other=0.0)
                error += _tile_error(part, tile_importance, s, z, top, WEIGHTED, NORM)
        better = error < best
        best = tl.where(better, error, best)
        best_scale = tl.where(better, s, best_scale)
        best_zero = tl.where(better, z, best_zero)
    tl.store(scale + at, best_scale, mask=live)
    tl.store(zero + at, best_zero, mask=live)


def search_fused(
    weight: Tensor,
    exact: Tensor,
    low: Tensor,
    scale: Tensor,
    zero: Tensor,
    top: int,
    sym: bool,
    importance: Tensor | None,
    tries: int,
    shrink_steps: int,
    limits: tuple[float, float],
    norm: float,
) -> None:
    """`grid._search` on CUDA for all rows at once; `scale` and `zero` (contiguous) are updated in place.

    Args:
        weight: f32[N, G, C], columns contiguous.
        exact: f32[N, G] scale of the whole range. `low`: f32[N, G] its lower end.
        scale: f32[N, G] to beat, and the result. `zero`: f32[N, G] likewise.
        top: Largest code. `sym`: keep the zero points.
        importance: f32[G, C] weights of squared errors, or None for |error|^norm.
        tries: Ranges, the first being the whole one. `shrink_steps`: try i keeps 1 - i / shrink_steps of it.
        limits: Smallest and largest scale.
        norm: Exponent of unweighted errors.
    """
    rows, groups, columns = weight.shape
    width = min(_TILE, triton.next_power_of_2(columns))
    height = max(1, _TILE // width)
    assert weight.stride(2) == 1 or columns == 1
    assert scale.is_contiguous() and zero.is_contiguous()
    with torch.cuda.device(weight.device) if weight.is_cuda else nullcontext():  # not CUDA: Triton's interpreter
        _search_kernel[(groups * triton.cdiv(rows, height),)](
            weight,
            weight if importance is None else importance.contiguous(),
            exact.contiguous(),
            low.contiguous(),
            scale,
            zero,
            rows,
            groups,
            columns,
            weight.stride(0),
            weight.stride(1),
            tries,
            float(shrink_steps),
            float(top),
            limits[0],
            limits[1],
            SYM=sym,
            WEIGHTED=importance is not None,
            NORM=norm,
            SINGLE=columns <= width,
            ROWS=height,
            COLUMNS=width,
            num_warps=4,
        )


@triton.jit
def _range_kernel(
    work, alive, scales, zeros, n, columns, stride, top, smallest, largest,
    SYM: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = r < n
    low = tl.zeros([COLUMNS, ROWS], tl.float32)  # a range holds 0
    high = tl.zeros([COLUMNS, ROWS], tl.float32)
    for begin in range(0, columns, COLUMNS):
        c = begin + tl.arange(0, COLUMNS)
        w = tl.load(work + c[:, None] * stride + r[None, :], mask=(c < columns)[:, None] & live[None, :], other=0.0)
        if MASKED:
            w = w * tl.load(alive + c, mask=c < columns, other=0.0)[:, None]
        low, high = tl.minimum(low, w), tl.maximum(high, w)
    bottom, peak = tl.min(low, axis=0), tl.max(high, axis=0)
    if SYM:
        peak = tl.maximum(-bottom, peak)
        bottom = -peak
    empty = (bottom == 0) & (peak == 0)
    bottom, peak = tl.where(empty, -1.0, bottom), tl.where(empty, 1.0, peak)
    exact = tl.div_rn(peak, top + tl.zeros_like(peak)) - tl.div_rn(bottom, top + tl.zeros_like(peak))
    half = tl.minimum(tl.maximum(exact, smallest), largest).to(tl.float16)
    bits = half.to(tl.int16, bitcast=True) + (half.to(tl.float32) < exact).to(tl.int16)
    scale = bits.to(tl.float16, bitcast=True).to(tl.float32)
    scale = tl.minimum(tl.maximum(scale, smallest), largest)
    if SYM:
        zero = tl.zeros_like(scale) + (top + 1.0) / 2.0
    else:
        zero = tl.minimum(tl.maximum((tl.div_rn(-bottom, scale) + 12582912.0) - 12582912.0, 0.0), top)
    tl.store(scales + r, scale, mask=live)
    tl.store(zeros + r, zero, mask=live)


def fit_range_fused(
    work: Tensor,
    alive: Tensor | None,
    scales: Tensor,
    zeros: Tensor,
    top: int,
    sym: bool,
    limits: tuple[float, float],
) -> None:
    """`grid.fit` by range of one group on CUDA, on the transposed weight that the column loop works on.

    Args:
        work: f32[C, N] the group's columns, each with its N weights side by side.
        alive: f32[C] factors of the columns, or None for 1.
        scales: f32[N], contiguous, receives the scales. `zeros`: f32[N] likewise the zero points.
        top: Largest code. `sym`: a symmetric range.
        limits: Smallest and largest scale.
    """
    columns, n = work.shape
    assert n == 1 or work.stride(1) == 1
    with torch.cuda.device(work.device) if work.is_cuda else nullcontext():  # not CUDA: Triton's interpreter
        _range_kernel[(triton.cdiv(n, 64),)](
            work,
            work if alive is None else alive,
            scales,
            zeros,
            n,
            columns,
            work.stride(0),
            float(top),
            limits[0],
            limits[1],
            SYM=sym,
            MASKED=alive is not None,
            ROWS=64,
            COLUMNS=32,
            num_warps=4,
        )
