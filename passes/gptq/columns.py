# SPDX-License-Identifier: Apache-2.0
"""The inner loop of GPTQ: one column after the other within a narrow panel, vectorized over rows."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from gptq_compile.passes.gptq.threads import one_thread

log = logging.getLogger(__name__)

PANEL = 32  # columns per panel where each column costs several operations: panels stay in cache
FUSED_PANEL = 128  # columns per panel where a panel is one launch
BLOCK = 512  # columns between two updates of all columns behind them, on a GPU
SERIAL_ROWS = 16384  # rows below which a column's operations are too short to share among CPU threads


@functools.cache
def _fused() -> Callable[..., None] | None:
    """The one-launch CUDA version, or None without Triton (an optional part of torch's CUDA wheels)."""
    try:
        from gptq_compile.passes.gptq.columns_triton import quantize_panel_fused
    except ImportError as error:
        log.warning("Triton cannot be imported (%s); GPTQ's column loop launches seven kernels a column.", error)
        return None
    return quantize_panel_fused


@functools.cache
def fused_range() -> Callable[..., None] | None:
    """The one-launch CUDA version of fitting a group by its range, or None without Triton."""
    if _fused() is None:
        return None
    from gptq_compile.passes.gptq.grid_triton import fit_range_fused

    return fit_range_fused


@functools.cache
def _fused_update() -> Callable[..., None] | None:
    """The update of all weights behind a block on tensor cores, or None without Triton."""
    if _fused() is None:
        return None
    from gptq_compile.passes.gptq import update_triton

    return update_triton.subtract_product


def subtract_product(work: Tensor, upper: Tensor, error: Tensor) -> None:
    """work -= upper^T error: what a block's errors cost all columns behind it (paper, step 4 of section 3.3).

    Args:
        work: f32[M, N] weights of the columns behind, transposed.
        upper: f32[P, M] the block's rows of U. ``error``: f32[P, N] its errors.
    """
    fused = _fused_update() if work.is_cuda and error.shape[0] <= BLOCK else None
    if fused is None:
        work.addmm_(upper.t(), error, alpha=-1)
    else:
        fused(work, upper, error)


def panel_width(device: torch.device) -> int:
    """Columns per panel that are fastest on a device."""
    return FUSED_PANEL if device.type == "cuda" and _fused() is not None else PANEL


def quantize_panel(
    work: Tensor,
    upper: Tensor,
    inverse_pivots: list[float],
    scales: Tensor,
    zeros: Tensor,
    groups: Tensor,
    top: int,
    error: Tensor,
    codes: Tensor,
) -> None:
    """Quantize P columns, each with the corrections of those before it (paper equations 4 and 5).

    Left-looking: a column gathers its corrections by one matrix-vector product just before it is rounded, so a column
    costs seven short operations and the panel stays in cache.

    Args:
        work: f32[P, N] weights, transposed, corrected for all earlier columns; overwritten.
        upper: f32[P, P] diagonal block of U, U^T U = H^-1.
        inverse_pivots: 1 / U[i, i] (not read by the CUDA version).
        scales: f32[G, N] scale of each weight by group.
        zeros: f32[G, N] zero points.
        groups: i64[P] group of each column.
        top: Largest code.
        error: f32[P, N], receives (w - dequantized w) / U[i, i].
        codes: u8[P, N], receives the codes.
    """
    if work.is_cuda and (fused := _fused()) is not None:
        fused(work, upper, scales, zeros, groups, top, error, codes)
        return
    with one_thread(work.device.type == "cpu" and work.shape[1] < SERIAL_ROWS):
        codes.copy_(_quantize_panel(work, upper, inverse_pivots, scales[groups], zeros[groups], top, error))


def _quantize_panel(
    work: Tensor,
    upper: Tensor,
    inverse_pivots: list[float],
    scales: Tensor,
    zeros: Tensor,
    top: int,
    error: Tensor,
) -> Tensor:
    low, high = -zeros, top - zeros
    steps = torch.empty_like(work)  # code - zero
    columns, errors, rounded = work.unbind(0), error.unbind(0), steps.unbind(0)
    gather = upper.t().contiguous()
    back = error.t()
    for i, (w, e, q, s, lo, hi) in enumerate(
        zip(columns, errors, rounded, scales.unbind(0), low.unbind(0), high.unbind(0), strict=True)
    ):
        if i:
            torch.addmv(w, back[:, :i], gather[i, :i], alpha=-1, out=w)
        torch.div(w, s, out=q)
        q.round_().clamp_(lo, hi)
        torch.mul(q, s, out=e)
        torch.sub(w, e, out=e)
        e.mul_(inverse_pivots[i])
    return steps.add_(zeros).to(torch.uint8)
