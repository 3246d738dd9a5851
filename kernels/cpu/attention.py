# SPDX-License-Identifier: Apache-2.0
# TVMScript annotations are calls, which mypy does not take for types.
# mypy: disable-error-code="valid-type, no-redef"
"""Paged attention and cache append for the CPU.

Both attention kernels run the online softmax of FlashAttention (Dao et al. 2022, algorithm 1) page by page, so that
any context length works, and never read a cache position that the token may not see: cache pages come uninitialized.
"""

from __future__ import annotations

from typing import Any

from gptq_compile.kernels import tirx_math as tm
from gptq_compile.kernels.attention_params import AttentionParams, refuse_attention, refuse_dtype
from gptq_compile.kernels.registry import Case, Kernel, Refusal
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import T

# Stand-in for minus infinity that stays finite in (score - maximum), so that an empty maximum gives weight 0, not NaN.
_MASKED = -3.0e38
_NO_MAXIMUM = -1.0e30
# Decode splits the context so that about this many tasks exist whatever the batch and the number of heads.
_DECODE_TASKS = 32
_DECODE_MOST_ROWS = 16
# Query tokens that share one pass over the keys in prefill.
_BLOCK_TOKENS = 16
# Rows of the register tile of the small matrix products in prefill.
_TILE_ROWS = 4


def _score(p: AttentionParams, score: Any, distance: Any, slope: Any) -> Any:
    """Applies soft cap and alibi to a scaled score; `distance` is j - position <= 0."""
    if p.softcap:
        score = tm.f32(p.softcap) * tm.tanh(score * tm.f32(1.0 / p.softcap))
    if p.has_alibi:
        score = score + slope * T.Cast("float32", distance)
    return score


def _first_position(p: AttentionParams, position: Any) -> Any:
    """Returns the first cache position a token at `position` sees."""
    return T.max(position - (p.window - 1), 0) if p.window else T.int32(0)


def _decode(case: Case, target: Target) -> Any:
    """One (token, key head, part of the context) per task, then a combine of the parts (flash decoding)."""
    p = AttentionParams.of(case)
    n: Any = case.rows  # known: `_accepts_decode` asks for it
    dtype = case.dtype
    G, D, Dv, P, Hkv = p.group, p.head_dim, p.v_head_dim, p.page_size, p.kv_heads
    S = max(1, -(-_DECODE_TASKS // (n * Hkv)))
    num_pages, b, table = tm.symbol("num_pages"), tm.symbol("b"), tm.symbol("p")
    QL, VL, SL = tm.lanes(D), tm.lanes(Dv), tm.lanes(P)
    VT = next(tile for tile in (4, 3, 2, 1) if (Dv // VL) % tile == 0)
    GT = next(tile for tile in (4, 3, 2, 1) if G % tile == 0)
    combine = T.parallel if n * p.heads * S * Dv > 1 << 16 else T.serial

    @T.prim_func(s_tir=True)
    def paged_attention(
        q: T.Buffer((n, p.heads, D), dtype),
        k_cache: T.Buffer((num_pages, Hkv, P, D), dtype),
        v_cache: T.Buffer((num_pages, Hkv, P, Dv), dtype),
        positions: T.Buffer((n,), "int32"),
        seq_of_token: T.Buffer((n,), "int32"),
        page_table: T.Buffer((b, table), "int32"),
        sinks: T.Buffer((p.heads,), "float32"),
        alibi_slopes: T.Buffer((p.heads,), "float32"),
        out: T.Buffer((n, p.heads, Dv), dtype),
    ):
        part_m = T.alloc_buffer((n * Hkv * S * G,), "float32")
        part_l = T.alloc_buffer((n * Hkv * S * G,), "float32")
        part_o = T.alloc_buffer((n * Hkv * S * G, Dv), "float32")
        for task in T.parallel(n * Hkv * S):
            t: T.let[T.int32] = task // (Hkv * S)
            h: T.let[T.int32] = task // S % Hkv
            position: T.let[T.int32] = positions[t]
            first: T.let[T.int32] = _first_position(p, position)
            pages: T.let[T.int32] = position // P - first // P + 1
            per_task: T.let[T.int32] = (pages + S - 1) // S
            begin: T.let[T.int32] = first // P + (task % S) * per_task
            end: T.let[T.int32] = T.min(begin + per_task, position // P + 1)
            queries = T.alloc_buffer((G, D), "float32")
            scores = T.alloc_buffer((G, P), "float32")
            m = T.alloc_buffer((G,), "float32")
            l = T.alloc_buffer((G,), "float32")
            for g in range(G):
                m[g] = T.float32(_NO_MAXIMUM)
                l[g] = T.float32(0)
                for i in range(D // QL):
                    for v in T.vectorized(QL):
                        queries[g, i * QL + v] = T.Cast("float32", q[t, h * G + g, i * QL + v]) * T.float32(p.scale)
                for i in range(Dv // VL):
                    for v in T.vectorized(VL):
                        part_o[task * G + g, i * VL + v] = T.float32(0)
            for page in T.serial(T.max(end - begin, 0)):
                base: T.let[T.int32] = (begin + page) * P
                physical: T.let[T.int32] = page_table[seq_of_token[t], begin + page]
                low: T.let[T.int32] = T.max(first - base, 0)
                high: T.let[T.int32] = T.min(position - base + 1, P)
                for g in range(G):
                    for i in range(P // SL):
                        for v in T.vectorized(SL):
                            scores[g, i * SL + v] = T.float32(_MASKED)
                for j0 in range(high - low):
                    for g0 in range(G // GT):
                        acc = T.alloc_buffer((GT * QL,), "float32")
                        for g in T.unroll(GT):
                            for v in T.vectorized(QL):
                                acc[g * QL + v] = T.float32(0)
                        for i in range(D // QL):
                            for g in T.unroll(GT):
                                for v in T.vectorized(QL):
                                    acc[g * QL + v] = acc[g * QL + v] + queries[g0 * GT + g, i * QL + v] * T.Cast(
                                        "float32", k_cache[physical, h, low + j0, i * QL + v]
                                    )
                        for g in T.unroll(GT):
                            if QL == 8:
                                for v in T.vectorized(4):
                                    acc[g * QL + v] = acc[g * QL + v] + acc[g * QL + 4 + v]
                            if QL >= 4:
                                for v in T.vectorized(2):
                                    acc[g * QL + v] = acc[g * QL + v] + acc[g * QL + 2 + v]
                            if QL >= 2:
                                acc[g * QL] = acc[g * QL] + acc[g * QL + 1]
                            scores[g0 * GT + g, low + j0] = _score(
                                p,
                                acc[g * QL],
                                base + low + j0 - position,
                                alibi_slopes[h * G + g0 * GT + g] if p.has_alibi else None,
                            )
                for g in range(G):
                    top: T.float32 = m[g]
                    for j in T.unroll(P):
                        top = T.max(top, scores[g, j])
                    rescale: T.float32 = tm.exp(m[g] - top)
                    m[g] = top
                    for i in range(P // SL):
                        for v in T.vectorized(SL):
                            scores[g, i * SL + v] = tm.exp(scores[g, i * SL + v] - top)
                    total: T.float32 = l[g] * rescale
                    for j in T.unroll(P):
                        total = total + scores[g, j]
                    l[g] = total
                    for i in range(Dv // VL // VT):
                        o = T.alloc_buffer((VT * VL,), "float32")
                        for c in T.unroll(VT):
                            for v in T.vectorized(VL):
                                o[c * VL + v] = part_o[task * G + g, (i * VT + c) * VL + v] * rescale
                        for j0 in range(high - low):
                            for c in T.unroll(VT):
                                for v in T.vectorized(VL):
                                    o[c * VL + v] = o[c * VL + v] + scores[g, low + j0] * T.Cast(
                                        "float32", v_cache[physical, h, low + j0, (i * VT + c) * VL + v]
                                    )
                        for c in T.unroll(VT):
                            for v in T.vectorized(VL):
                                part_o[task * G + g, (i * VT + c) * VL + v] = o[c * VL + v]
            for g in range(G):
                part_m[task * G + g] = m[g]
                part_l[task * G + g] = l[g]
        for row in combine(n * p.heads):
            t: T.let[T.int32] = row // p.heads
            head: T.let[T.int32] = row % p.heads
            start: T.let[T.int32] = (t * Hkv + head // G) * S * G + head % G
            top: T.float32 = T.float32(_NO_MAXIMUM)
            total: T.float32 = T.float32(0)
            if p.has_sinks:
                top = sinks[head]
                total = T.float32(1)
            for s in range(S):
                if part_m[start + s * G] > top:
                    total = total * tm.exp(top - part_m[start + s * G])
                    top = part_m[start + s * G]
                total = total + part_l[start + s * G] * tm.exp(part_m[start + s * G] - top)
            for i in range(Dv // VL):
                o = T.alloc_buffer((VL,), "float32")
                for v in T.vectorized(VL):
                    o[v] = T.float32(0)
                for s in range(S):
                    weight: T.float32 = tm.exp(part_m[start + s * G] - top)
                    for v in T.vectorized(VL):
                        o[v] = o[v] + weight * part_o[start + s * G, i * VL + v]
                for v in T.vectorized(VL):
                    out[t, head, i * VL + v] = T.Cast(dtype, o[v] / total)

    return tm.without_params(paged_attention, p.absent)


def _accepts_decode(case: Case, target: Target) -> Refusal | None:
    if case.rows is None or case.rows > _DECODE_MOST_ROWS:
        return Refusal(f"is for 1 to {_DECODE_MOST_ROWS} tokens known at compile time, not {case.rows or 'symbolic'}")
    return refuse_attention(case)


def _prefill(case: Case, target: Target) -> Any:
    """One (block of tokens, key head) per task; tokens of a block that share a sequence share the pass over keys."""
    p = AttentionParams.of(case)
    n, dtype = tm.rows(case), case.dtype
    G, D, Dv, P, Hkv = p.group, p.head_dim, p.v_head_dim, p.page_size, p.kv_heads
    B, R = _BLOCK_TOKENS, _TILE_ROWS
    rows = -(-B * G // R) * R
    num_pages, b, table = tm.symbol("num_pages"), tm.symbol("b"), tm.symbol("p")
    QL, VL, SL = tm.lanes(D), tm.lanes(Dv), tm.lanes(P)
    ST, VT = tm.lanes(P // SL, 2), tm.lanes(Dv // VL, 2)

    @T.inline
    def multiply(acc, left, right, row, column, depth, lanes, tile):
        """acc[R, tile * lanes] += left[row + r, :depth] @ right[:depth, column:]."""
        for k in range(depth):
            for r in T.unroll(R):
                for c in T.unroll(tile):
                    for v in T.vectorized(lanes):
                        acc[(r * tile + c) * lanes + v] = (
                            acc[(r * tile + c) * lanes + v] + left[row + r, k] * right[k, column + c * lanes + v]
                        )

    @T.prim_func(s_tir=True)
    def paged_attention(
        q: T.Buffer((n, p.heads, D), dtype),
        k_cache: T.Buffer((num_pages, Hkv, P, D), dtype),
        v_cache: T.Buffer((num_pages, Hkv, P, Dv), dtype),
        positions: T.Buffer((n,), "int32"),
        seq_of_token: T.Buffer((n,), "int32"),
        page_table: T.Buffer((b, table), "int32"),
        sinks: T.Buffer((p.heads,), "float32"),
        alibi_slopes: T.Buffer((p.heads,), "float32"),
        out: T.Buffer((n, p.heads, Dv), dtype),
    ):
        for task in T.parallel((T.Cast("int32", n) + B - 1) // B * Hkv):
            tokens: T.let[T.int32] = T.Cast("int32", n)
            blocks: T.let[T.int32] = (tokens + B - 1) // B
            h: T.let[T.int32] = task // blocks
            turn: T.let[T.int32] = task % blocks
            # Later blocks see more keys: deal them out from both ends, since threads get contiguous ranges of tasks.
            block: T.let[T.int32] = T.if_then_else(turn % 2 == 0, turn // 2, blocks - 1 - turn // 2)
            stop: T.let[T.int32] = T.min(tokens, block * B + B)
            queries = T.alloc_buffer((rows, D), "float32")
            keys = T.alloc_buffer((D, P), "float32")
            values = T.alloc_buffer((P, Dv), "float32")
            scores = T.alloc_buffer((rows, P), "float32")
            o = T.alloc_buffer((rows, Dv), "float32")
            m = T.alloc_buffer((rows,), "float32")
            l = T.alloc_buffer((rows,), "float32")
            start: T.int32 = block * B
            while start < stop:
                # A run of consecutive tokens of one sequence.
                length: T.int32 = 1
                lowest: T.int32 = _first_position(p, positions[start])
                highest: T.int32 = positions[start]
                while start + length < stop and seq_of_token[T.min(start + length, stop - 1)] == seq_of_token[start]:
                    lowest = T.min(lowest, _first_position(p, positions[start + length]))
                    highest = T.max(highest, positions[start + length])
                    length = length + 1
                # Row r is head r % G of token r // G of the run; the rows that fill the last tile are scratch.
                padded: T.let[T.int32] = (length * G + R - 1) // R
                for r in range(padded * R):
                    token: T.let[T.int32] = start + T.min(r // G, length - 1)
                    m[r] = T.float32(_NO_MAXIMUM)
                    l[r] = T.float32(0)
                    for i in range(D // QL):
                        for v in T.vectorized(QL):
                            queries[r, i * QL + v] = T.Cast("float32", q[token, h * G + r % G, i * QL + v]) * T.float32(
                                p.scale
                            )
                    for i in range(Dv // VL):
                        for v in T.vectorized(VL):
                            o[r, i * VL + v] = T.float32(0)
                for page in T.serial(highest // P - lowest // P + 1):
                    base: T.let[T.int32] = (lowest // P + page) * P
                    physical: T.let[T.int32] = page_table[seq_of_token[start], lowest // P + page]
                    for j in range(P):
                        if lowest <= base + j and base + j <= highest:
                            for d in range(D):
                                keys[d, j] = T.Cast("float32", k_cache[physical, h, j, d])
                            for i in range(Dv // VL):
                                for v in T.vectorized(VL):
                                    values[j, i * VL + v] = T.Cast("float32", v_cache[physical, h, j, i * VL + v])
                        else:
                            for d in range(D):
                                keys[d, j] = T.float32(0)
                            for i in range(Dv // VL):
                                for v in T.vectorized(VL):
                                    values[j, i * VL + v] = T.float32(0)
                    for tile in range(padded):
                        for i in range(P // SL // ST):
                            acc = T.alloc_buffer((R * ST * SL,), "float32")
                            for r in T.unroll(R * ST):
                                for v in T.vectorized(SL):
                                    acc[r * SL + v] = T.float32(0)
                            multiply(acc, queries, keys, tile * R, i * ST * SL, D, SL, ST)
                            for r in T.unroll(R):
                                for c in T.unroll(ST):
                                    for v in T.vectorized(SL):
                                        scores[tile * R + r, (i * ST + c) * SL + v] = acc[(r * ST + c) * SL + v]
                    for r in range(padded * R):
                        position: T.let[T.int32] = positions[start + T.min(r // G, length - 1)]
                        first: T.let[T.int32] = _first_position(p, position)
                        top: T.float32 = m[r]
                        for i in range(P // SL):
                            for v in T.vectorized(SL):
                                scores[r, i * SL + v] = T.Select(
                                    T.And(first <= base + i * SL + v, base + i * SL + v <= position),
                                    _score(
                                        p,
                                        scores[r, i * SL + v],
                                        base + i * SL + v - position,
                                        alibi_slopes[h * G + r % G] if p.has_alibi else None,
                                    ),
                                    T.float32(_MASKED),
                                )
                        for j in T.unroll(P):
                            top = T.max(top, scores[r, j])
                        rescale: T.float32 = tm.exp(m[r] - top)
                        m[r] = top
                        for i in range(P // SL):
                            for v in T.vectorized(SL):
                                scores[r, i * SL + v] = tm.exp(scores[r, i * SL + v] - top)
                        total: T.float32 = l[r] * rescale
                        for j in T.unroll(P):
                            total = total + scores[r, j]
                        l[r] = total
                        if rescale != T.float32(1):
                            for i in range(Dv // VL):
                                for v in T.vectorized(VL):
                                    o[r, i * VL + v] = o[r, i * VL + v] * rescale
                    for tile in range(padded):
                        for i in range(Dv // VL // VT):
                            acc = T.alloc_buffer((R * VT * VL,), "float32")
                            for r in T.unroll(R):
                                for c in T.unroll(VT):
                                    for v in T.vectorized(VL):
                                        acc[(r * VT + c) * VL + v] = o[tile * R + r, (i * VT + c) * VL + v]
                            multiply(acc, scores, values, tile * R, i * VT * VL, P, VL, VT)
                            for r in T.unroll(R):
                                for c in T.unroll(VT):
                                    for v in T.vectorized(VL):
                                        o[tile * R + r, (i * VT + c) * VL + v] = acc[(r * VT + c) * VL + v]
                for r in range(length * G):
                    total: T.float32 = l[r]
                    factor: T.float32 = T.float32(1)
                    if p.has_sinks:
                        top: T.let[T.float32] = T.max(m[r], sinks[h * G + r % G])
                        factor = tm.exp(m[r] - top)
                        total = total * factor + tm.exp(sinks[h * G + r % G] - top)
                    for i in range(Dv // VL):
                        for v in T.vectorized(VL):
                            out[start + r // G, h * G + r % G, i * VL + v] = T.Cast(
                                dtype, o[r, i * VL + v] * (factor / total)
                            )
                start = start + length

    return tm.without_params(paged_attention, p.absent)


def _append(case: Case, target: Target) -> Any:
    """Copies k and v of each token to its slot; a negative slot is skipped."""
    n, dtype = tm.rows(case), case.dtype
    H, D, P = int(case["kv_heads"]), int(case["head_dim"]), int(case.get("page_size", 16))
    Dv = int(case.get("v_head_dim", D))
    num_pages = tm.symbol("num_pages")
    KL, VL = tm.lanes(D, 16), tm.lanes(Dv, 16)
    loop = T.serial if case.rows is not None and case.rows * H * (D + Dv) <= 1 << 15 else T.parallel

    @T.prim_func(s_tir=True)
    def kv_append(
        k: T.Buffer((n, H, D), dtype),
        v: T.Buffer((n, H, Dv), dtype),
        slots: T.Buffer((n,), "int32"),
        k_cache: T.Buffer((num_pages, H, P, D), dtype),
        v_cache: T.Buffer((num_pages, H, P, Dv), dtype),
    ):
        for t in loop(n):
            slot: T.let[T.int32] = slots[t]
            if slot >= 0:
                for h in range(H):
                    for i in range(D // KL):
                        for c in T.vectorized(KL):
                            k_cache[slot // P, h, slot % P, i * KL + c] = k[t, h, i * KL + c]
                    for i in range(Dv // VL):
                        for c in T.vectorized(VL):
                            v_cache[slot // P, h, slot % P, i * VL + c] = v[t, h, i * VL + c]

    return kv_append


KERNELS = (
    Kernel("cpu.paged_attention.split", "paged_attention", _accepts_decode, _decode),
    Kernel("cpu.paged_attention.blocked", "paged_attention", lambda case, target: refuse_attention(case), _prefill),
    Kernel("cpu.kv_append", "kv_append", lambda case, target: refuse_dtype(case), _append),
)
