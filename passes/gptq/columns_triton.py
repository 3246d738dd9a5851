# SPDX-License-Identifier: Apache-2.0
"""The column loop of a panel as one CUDA kernel: rows are independent, so each warp takes its rows through all of it.

Column by column from the host, this loop is nearly all launch latency (0.26 s a linear on an H100). In the kernel it
is nearly all latency too, of the chain from one column to the next; so a warp holds only a strip of columns at a time,
corrects it for the panel's earlier strips by a small product, and fetches what the next column needs ahead of time.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # weight rows of one program, which is one warp: no synchronization between columns
STRIP = 16  # columns in registers at a time


@triton.jit
def _panel_kernel(
    work, upper, scales, zeros, groups, codes, error, n, width, stride_work, stride_upper, stride_error, top,
    STRIP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < n
    c = tl.arange(0, STRIP)
    for begin in range(0, width, STRIP):
        columns = begin + c
        inside = columns < width
        w = tl.load(
            work + columns[:, None] * stride_work + rows[None, :], mask=inside[:, None] & live[None, :], other=0.0
        )
        tl.debug_barrier()  # errors below were stored by other lanes
        for before in range(0, begin, STRIP):
            u = tl.load(
                upper + (before + c)[None, :] * stride_upper + columns[:, None], mask=inside[:, None], other=0.0
            )
            e = tl.load(error + (before + c)[:, None] * stride_error + rows[None, :], mask=live[None, :], other=0.0)
            w -= tl.dot(u, e, input_precision="ieee")
        g = tl.load(groups + begin)
        scale = tl.load(scales + g * n + rows, mask=live, other=1.0)
        zero = tl.load(zeros + g * n + rows, mask=live, other=0.0)
        inverse = 1.0 / tl.load(upper + begin * stride_upper + begin)
        u = tl.load(upper + begin * stride_upper + columns, mask=(c > 0) & inside, other=0.0)
        for i in range(begin, tl.minimum(begin + STRIP, width)):
            j = tl.minimum(i + 1, width - 1)
            g = tl.load(groups + j)
            next_scale = tl.load(scales + g * n + rows, mask=live, other=1.0)
            next_zero = tl.load(zeros + g * n + rows, mask=live, other=0.0)
            next_inverse = 1.0 / tl.load(upper + j * stride_upper + j)
            next_u = tl.load(upper + j * stride_upper + columns, mask=(columns > j) & inside, other=0.0)
            column = tl.sum(tl.where((columns == i)[:, None], w, 0.0), axis=0)
            step = tl.div_rn(column, scale)
            step = tl.minimum(tl.maximum(step, -zero), top - zero)
            # Adding 1.5 * 2^23 leaves no fraction bits: rounds half to even, as torch.round does.
            step = (step + 12582912.0) - 12582912.0
            e = (column - step * scale) * inverse
            w -= u[:, None] * e[None, :]
            tl.store(error + i * stride_error + rows, e, mask=live)
            tl.store(codes + i * n + rows, (step + zero).to(tl.uint8), mask=live)
            scale, zero, inverse, u = next_scale, next_zero, next_inverse, next_u


def quantize_panel_fused(
    work: Tensor,
    upper: Tensor,
    scales: Tensor,
    zeros: Tensor,
    groups: Tensor,
    top: int,
    error: Tensor,
    codes: Tensor,
) -> None:
    """`columns.quantize_panel` on CUDA; `work` is only read, rows of `upper` are contiguous."""
    width, n = work.shape
    assert upper.stride(1) == 1 and (n == 1 or work.stride(1) == error.stride(1) == 1)
    assert scales.is_contiguous() and zeros.is_contiguous() and codes.is_contiguous() and groups.is_contiguous()
    with torch.cuda.device(work.device) if work.is_cuda else nullcontext():  # not CUDA: Triton's interpreter
        _panel_kernel[(triton.cdiv(n, ROWS),)](
            work,
            upper,
            scales,
            zeros,
            groups,
            codes,
            error,
            n,
            width,
            work.stride(0),
            upper.stride(0),
            error.stride(0),
            float(top),
            STRIP=STRIP,
            ROWS=ROWS,
            num_warps=1,
        )
