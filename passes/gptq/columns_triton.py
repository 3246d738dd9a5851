# SPDX-License-Identifier: Apache-2.0
"""The column loop of a panel as one CUDA kernel: rows are independent, so each warp keeps its rows in registers.

Column by column from the host, this loop is nearly all launch latency (0.26 s a linear on an H100).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # weight rows of one program, which is one warp: no synchronization between columns


@triton.jit
def _panel_kernel(
    work, upper, scales, zeros, codes, error, n, width, stride_work, stride_upper, stride_error, top,
    PANEL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, PANEL)
    live = rows < n
    tile = columns[:, None] * stride_work + rows[None, :]
    w = tl.load(work + tile, mask=(columns < width)[:, None] & live[None, :], other=0.0)
    for i in range(width):
        column = tl.sum(tl.where((columns == i)[:, None], w, 0.0), axis=0)
        scale = tl.load(scales + i * n + rows, mask=live, other=1.0)
        zero = tl.load(zeros + i * n + rows, mask=live, other=0.0)
        step = tl.div_rn(column, scale)
        step = tl.minimum(tl.maximum(step, -zero), top - zero)
        # Adding 1.5 * 2^23 leaves no fraction bits: rounds half to even, as torch.round does.
        step = (step + 12582912.0) - 12582912.0
        pivot = tl.load(upper + i * stride_upper + i)
        e = tl.div_rn(column - step * scale, pivot)
        tl.store(error + i * stride_error + rows, e, mask=live)
        tl.store(codes + i * n + rows, (step + zero).to(tl.uint8), mask=live)
        u = tl.load(upper + i * stride_upper + columns, mask=(columns > i) & (columns < width), other=0.0)
        w -= u[:, None] * e[None, :]


def quantize_panel_fused(work: Tensor, upper: Tensor, scales: Tensor, zeros: Tensor, top: int, error: Tensor) -> Tensor:
    """`columns.quantize_panel` on CUDA; `work` is only read, rows of `upper` are contiguous."""
    width, n = work.shape
    assert upper.stride(1) == 1 and (n == 1 or work.stride(1) == error.stride(1) == 1)
    assert scales.is_contiguous() and zeros.is_contiguous()
    codes = torch.empty(width, n, dtype=torch.uint8, device=work.device)
    with torch.cuda.device(work.device):
        _panel_kernel[(triton.cdiv(n, ROWS),)](
            work,
            upper,
            scales,
            zeros,
            codes,
            error,
            n,
            width,
            work.stride(0),
            upper.stride(0),
            error.stride(0),
            float(top),
            PANEL=triton.next_power_of_2(width),
            ROWS=ROWS,
            num_warps=1,
        )
    return codes
