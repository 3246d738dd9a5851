# SPDX-License-Identifier: Apache-2.0
"""Received attention on CUDA without ever storing a probability: two sweeps over query-key tiles.

The first sweep finds each query's log-sum-exp over the keys (as FlashAttention does, arXiv 2205.14135), the second sums
squared probabilities over queries for each key. Stored, the probabilities of one layer of an 8B model on 128 sequences
of 2,048 tokens would be 69 GB in float32, written and read several times.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 64  # queries, and keys, of a tile


@triton.jit
def _scores(
    q, k, i, j, n, scale, window, softcap, slope,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Masked scores of a tile of queries i by keys j; padding counts as hidden."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if CAPPED:
        s = softcap * (1.0 - 2.0 / (tl.exp(2.0 * s / softcap) + 1.0))  # softcap * tanh(s / softcap)
    distance = i[:, None] - j[None, :]
    s -= slope * distance.to(tl.float32)
    seen = (distance >= 0) & (j < n)[None, :] & (i < n)[:, None]
    if WINDOWED:
        seen = seen & (distance < window)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _normalizer_kernel(
    q, k, sinks, slopes, lse, n, heads, repeat, dim, sq_b, sq_n, sq_h, sk_b, sk_n, sk_h, scale, window, softcap,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, SINKS: tl.constexpr, ALIBI: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    d = tl.arange(0, DIM)
    slope = tl.load(slopes + head) if ALIBI else 0.0
    rows = tl.load(
        q + batch * sq_b + i[:, None] * sq_n + head * sq_h + d[None, :],
        mask=(i < n)[:, None] & (d < dim)[None, :], other=0.0,
    )  # fmt: skip
    largest = tl.full([TILE], -1e30, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    if SINKS:
        largest = tl.zeros([TILE], tl.float32) + tl.load(sinks + head)
        total = tl.full([TILE], 1.0, tl.float32)
    begin = 0
    if WINDOWED:
        begin = tl.maximum(tl.program_id(0) * TILE - window + 1, 0) // TILE * TILE
    for start in range(begin, tl.minimum((tl.program_id(0) + 1) * TILE, n), TILE):
        j = start + tl.arange(0, TILE)
        columns = tl.load(
            k + batch * sk_b + j[:, None] * sk_n + (head // repeat) * sk_h + d[None, :],
            mask=(j < n)[:, None] & (d < dim)[None, :], other=0.0,
        )  # fmt: skip
        s = _scores(rows, columns, i, j, n, scale, window, softcap, slope, CAPPED, WINDOWED, PRECISION)
        now = tl.maximum(largest, tl.max(s, axis=1))
        total = total * tl.exp(largest - now) + tl.sum(tl.exp(s - now[:, None]), axis=1)
        largest = now
    tl.store(lse + tl.program_id(1).to(tl.int64) * n + i, largest + tl.log(total), mask=i < n)


@triton.jit
def _received_kernel(
    q, k, slopes, lse, received, n, heads, repeat, dim, sq_b, sq_n, sq_h, sk_b, sk_n, sk_h, scale, window, softcap,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, ALIBI: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    j = tl.program_id(0) * TILE + tl.arange(0, TILE)
    d = tl.arange(0, DIM)
    slope = tl.load(slopes + head) if ALIBI else 0.0
    columns = tl.load(
        k + batch * sk_b + j[:, None] * sk_n + (head // repeat) * sk_h + d[None, :],
        mask=(j < n)[:, None] & (d < dim)[None, :], other=0.0,
    )  # fmt: skip
    total = tl.zeros([TILE], tl.float32)
    end = n
    if WINDOWED:
        end = tl.minimum(n, (tl.program_id(0) + 1) * TILE + window)
    for start in range(tl.program_id(0) * TILE, end, TILE):
        i = start + tl.arange(0, TILE)
        rows = tl.load(
            q + batch * sq_b + i[:, None] * sq_n + head * sq_h + d[None, :],
            mask=(i < n)[:, None] & (d < dim)[None, :], other=0.0,
        )  # fmt: skip
        norm = tl.load(lse + tl.program_id(1).to(tl.int64) * n + i, mask=i < n, other=0.0)
        s = _scores(rows, columns, i, j, n, scale, window, softcap, slope, CAPPED, WINDOWED, PRECISION)
        total += tl.sum(tl.exp(2.0 * (s - norm[:, None])), axis=0)
    tl.store(received + tl.program_id(1).to(tl.int64) * n + j, total, mask=j < n)


def received_fused(
    q: Tensor,
    k: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """Sum over queries of squared attention probabilities, averaged over heads.

    Args:
        q: [b, n, heads, head_dim] of any float type, the last dimension contiguous.
        k: [b, n, kv_heads, head_dim], same type.
        scale, window, softcap, sinks, alibi_slopes: as in ``dialect.attention_scores``.

    Returns:
        f32[b, n].
    """
    batch, n, heads, dim = q.shape
    q, k = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k))
    lse = torch.empty(batch * heads, n, dtype=torch.float32, device=q.device)
    received = torch.empty_like(lse)
    none = lse
    first = (q, k, none if sinks is None else sinks.float(), none if alibi_slopes is None else alibi_slopes.float())
    sizes = (n, heads, heads // k.shape[2], dim, *q.stride()[:3], *k.stride()[:3], scale, window, softcap)
    flags = {
        "CAPPED": softcap > 0,
        "WINDOWED": window > 0,
        "ALIBI": alibi_slopes is not None,
        "PRECISION": "ieee",
        "TILE": _TILE,
        "DIM": max(16, triton.next_power_of_2(dim)),
    }
    grid = (triton.cdiv(n, _TILE), batch * heads)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():  # not CUDA: Triton's interpreter
        _normalizer_kernel[grid](*first, lse, *sizes, SINKS=sinks is not None, **flags)
        _received_kernel[grid](first[0], first[1], first[3], lse, received, *sizes, **flags)
    return received.view(batch, heads, n).mean(1)
