# SPDX-License-Identifier: Apache-2.0
"""Quantization grids: w = scale * (code - zero), one scale (and zero point) per row and group of columns.

Scales are float16 numbers held in float32. The solver works with exactly the numbers a checkpoint stores, so a
dequantized file equals the solver's weights bit for bit: an 11-bit scale times an 8-bit integer is exact in float32.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

log = logging.getLogger(__name__)

MAX_SCALE = 65504.0  # largest finite float16
# Smallest float16. Subnormal scales are allowed: m * 2^-24 times a code difference below 256 is exact even in
# float16 arithmetic, while raising the scale to the smallest normal number would round small weights to zero.
MIN_SCALE = 2.0**-24

SHRINK_STEPS = 100  # the reference quantizer's grid and maxshrink: ranges of 100 %, 99 %, ... 21 %
SHRINK_TRIES = 80
UNWEIGHTED_NORM = 2.4
_BELOW = 0.55  # steps below 0 that round to a zero point of 1, also when the scale has been rounded to float16
# Elements searched at a time: few launches on a GPU, temporaries that stay in cache on a CPU.
_CHUNK = 1 << 24
_CHUNK_CPU = 1 << 15


@dataclass(frozen=True)
class Grid:
    """The grids of one weight.

    Attributes:
        scales: f32[N, G], each exactly a positive finite float16.
        zeros: u8[N, G], or None for symmetric grids (zero point 2^(bits-1)).
        bits: Bits of a code.
        group_size: Columns of a full group; column k of the grid's order belongs to group k // group_size.
    """

    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int

    def quantize(self, weight: Tensor) -> Tensor:
        """Nearest codes u8[N, K] of a weight [N, K] in the grid's column order."""
        n, k = weight.shape
        codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
        zeros = zero_points(self.scales, self.zeros, self.bits)
        for columns, g in _blocks(k, self.group_size):
            w = weight[:, columns].float().unflatten(1, (g.stop - g.start, -1))
            scale, zero = self.scales[:, g].unsqueeze(2), zeros[:, g].unsqueeze(2)
            q = torch.round(w / scale).clamp_(-zero, (1 << self.bits) - 1 - zero).add_(zero)
            codes[:, columns] = q.flatten(1).to(torch.uint8)
        return codes

    def dequantize(self, codes: Tensor) -> Tensor:
        """Weight f32[N, K] of codes u8[N, K] in the grid's column order, exact."""
        return dequantize(codes, self.scales, self.zeros, None, self.group_size, self.bits)


def zero_points(scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """Zero points as f32, shaped like `scales`."""
    return torch.full_like(scales, 1 << (bits - 1)) if zeros is None else zeros.to(scales.dtype)


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, g_idx: Tensor | None, group_size: int, bits: int
) -> Tensor:
    """W[n, k] = scale[n, g] * (code[n, k] - zero[n, g]).

    Args:
        codes: u8[N, K] in natural column order.
        scales: f32[N, G], float16 numbers.
        zeros: u8[N, G], or None for 2^(bits-1).
        g_idx: i32[K] group of each column, or None for k // group_size.
        group_size: Columns of a full group, or -1 for one group.
        bits: Bits of a code.

    Returns:
        f32[N, K], without rounding.
    """
    k = codes.shape[1]
    zero = zero_points(scales, zeros, bits)
    weight = codes.to(scales.dtype)
    if g_idx is not None:
        g = g_idx.long()
        return weight.sub_(zero[:, g]).mul_(scales[:, g])
    for columns, part in _blocks(k, k if group_size == -1 else group_size):
        w = weight[:, columns].unflatten(1, (part.stop - part.start, -1))
        w.sub_(zero[:, part].unsqueeze(2)).mul_(scales[:, part].unsqueeze(2))
    return weight


def to_fp16_up(scale: Tensor) -> Tensor:
    """Smallest float16 not below `scale` (f32, >= 0), within [MIN_SCALE, MAX_SCALE], as f32.

    Rounding up keeps a min-max range covered: no weight is then farther than half a step from the grid.
    """
    half = scale.clamp(MIN_SCALE, MAX_SCALE).half()
    short = half.float() < scale
    # Consecutive positive float16 numbers have consecutive bit patterns.
    up = (half.view(torch.int16) + short.to(torch.int16)).view(torch.float16)
    return up.float().clamp_(MIN_SCALE, MAX_SCALE)


def to_fp16_nearest(scale: Tensor) -> Tensor:
    """Nearest float16 to `scale` within [MIN_SCALE, MAX_SCALE], as f32."""
    return scale.clamp(MIN_SCALE, MAX_SCALE).half().float()


def fit(
    weight: Tensor, bits: int, sym: bool, mse: bool = False, importance: Tensor | None = None, min_zero: int = 0
) -> tuple[Tensor, Tensor]:
    """Fit one grid to each row of each group.

    Min-max as the GPTQ reference quantizer: the range always includes 0, an all-zero row gets [-1, 1]; symmetric
    ranges are [-m, m], m = max |w|, with scale 2m / (2^bits - 1) and zero point 2^(bits-1).

    Args:
        weight: f32[N, G, C], C columns of a group.
        bits: Bits of a code.
        sym: Symmetric grid.
        mse: Search shrunken ranges. The criterion is sum(importance * error^2), or sum(|error|^2.4) as in the
            reference quantizer when there is no importance.
        importance: f32[G, C], not negative: diag(H) of the columns.
        min_zero: Smallest zero point of asymmetric grids, 0 or 1: with 1, ranges without negative weights reach half a
            step below 0.

    Returns:
        scale f32[N, G] (float16 numbers) and zero f32[N, G] (whole numbers in 0..2^bits-1).
    """
    low, high = torch.aminmax(weight, dim=-1)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    empty = (low == 0) & (high == 0)
    low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
    top = (1 << bits) - 1
    if min_zero and not sym:
        low = torch.minimum(low, high * (-_BELOW / (top - _BELOW)))  # -low / ((high - low) / top) >= _BELOW
    exact = high / top - low / top  # not (high - low) / top: the difference may overflow
    scale = to_fp16_up(exact)
    zero = _zero(low, scale, top, sym)
    if mse and weight.is_cuda and (fused := _fused()) is not None:
        limits = MIN_SCALE, MAX_SCALE
        scale, zero = scale.contiguous(), zero.contiguous()
        fused(
            weight, exact, low, scale, zero, top, sym, importance, SHRINK_TRIES, SHRINK_STEPS, limits, UNWEIGHTED_NORM
        )
    elif mse:
        chunk = _CHUNK_CPU if weight.device.type == "cpu" else _CHUNK
        step = max(1, chunk // max(1, weight[0].numel()))
        for r in range(0, weight.shape[0], step):
            part = slice(r, r + step)
            _search(weight[part], exact[part], low[part], scale[part], zero[part], top, sym, importance)
    return scale, zero.clamp_(min=min_zero)


@functools.cache
def _fused() -> Callable[..., None] | None:
    """The one-launch CUDA version of `_search`, or None without Triton (an optional part of torch's CUDA wheels)."""
    try:
        from gptq_compile.passes.gptq.grid_triton import search_fused
    except ImportError as error:
        log.warning("Triton cannot be imported (%s); the search for grids reads the weights many times.", error)
        return None
    return search_fused


def _zero(low: Tensor, scale: Tensor, top: int, sym: bool) -> Tensor:
    if sym:
        return torch.full_like(scale, (top + 1) // 2)
    return torch.round(-low / scale).clamp_(0, top)


def _search(
    weight: Tensor,
    exact: Tensor,
    low: Tensor,
    scale: Tensor,
    zero: Tensor,
    top: int,
    sym: bool,
    importance: Tensor | None,
) -> None:
    """Replace scale and zero, in place, where a shrunken range has a smaller error."""
    room = torch.empty_like(weight)
    best = _grid_error(weight, scale, zero, top, importance, room)
    for i in range(1, SHRINK_TRIES):
        p = 1 - i / SHRINK_STEPS
        s = to_fp16_nearest(exact * p)
        z = _zero(low * p, s, top, sym)
        error = _grid_error(weight, s, z, top, importance, room)
        better = error < best
        best = torch.where(better, error, best)
        scale.copy_(torch.where(better, s, scale))
        zero.copy_(torch.where(better, z, zero))


def _grid_error(
    weight: Tensor, scale: Tensor, zero: Tensor, top: int, importance: Tensor | None, room: Tensor
) -> Tensor:
    s, z = scale.unsqueeze(-1), zero.unsqueeze(-1)
    error = torch.div(weight, s, out=room).round_().clamp_(-z, top - z).mul_(s).sub_(weight)
    if importance is None:
        return error.abs_().pow_(UNWEIGHTED_NORM).sum(-1)
    return error.square_().mul_(importance).sum(-1)


def fit_groups(
    weight: Tensor,
    bits: int,
    sym: bool,
    group_size: int,
    mse: bool = False,
    importance: Tensor | None = None,
    min_zero: int = 0,
) -> Grid:
    """Fit a grid to every row and group of columns.

    Args:
        weight: [N, K], any float type.
        bits: Bits of a code.
        sym: Symmetric grids.
        group_size: Columns of a group, or -1 for one group; the last may be short.
        mse: See `fit`.
        importance: f32[K] or None, see `fit`.
        min_zero: See `fit`.

    Returns:
        The grid.
    """
    n, k = weight.shape
    size = k if group_size == -1 else group_size
    scales = torch.empty(n, -(-k // size), dtype=torch.float32, device=weight.device)
    zeros = torch.empty_like(scales)
    for columns, g in _blocks(k, size):
        count = g.stop - g.start
        chosen = None if importance is None else importance[columns].unflatten(0, (count, -1))
        w = weight[:, columns].float().unflatten(1, (count, -1))
        scales[:, g], zeros[:, g] = fit(w, bits, sym, mse, chosen, min_zero)
    return Grid(scales, None if sym else zeros.to(torch.uint8), bits, size)


def _blocks(k: int, size: int) -> list[tuple[slice, slice]]:
    """(columns, groups) of the full groups, then of the short last group."""
    full = k // size
    parts = [(slice(0, full * size), slice(0, full))] if full else []
    if full * size < k:
        parts.append((slice(full * size, k), slice(full, full + 1)))
    return parts
