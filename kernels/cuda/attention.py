# SPDX-License-Identifier: Apache-2.0
# TVMScript annotations are calls, which mypy does not take for types.
# mypy: disable-error-code="valid-type, no-redef"
# TVMScript decides Python conditions while parsing and must see them apart from those of the kernel.
# ruff: noqa: SIM102
"""Paged attention and cache append for CUDA.

A block serves one token and a few query heads that share a key head. Its warps are cut into groups of lanes; a group
holds one key, 16 bytes a lane, and runs its own online softmax (Dao et al. 2022, algorithm 1) over every
``groups``-th position, several keys at a time to keep loads in flight. The groups are combined by shuffles and through
shared memory. A static number of tokens also splits the context over blocks (flash decoding), since few tokens do not
fill the machine; a second small kernel then combines the parts.
"""

from __future__ import annotations

from typing import Any

from gptq_compile.kernels import tirx_math as tm
from gptq_compile.kernels.attention_params import AttentionParams, refuse_attention, refuse_dtype, refuse_other_cache
from gptq_compile.kernels.cuda.block import WARP, shuffle_xor
from gptq_compile.kernels.cuda.norms import vector_width
from gptq_compile.kernels.registry import Case, Kernel, Refusal
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import T

_MASKED = -3.0e38
_NO_MAXIMUM = -1.0e30
_THREADS = 128
_WARPS = _THREADS // WARP
# Keys a group of lanes works on at a time.
_KEYS = 4
# Query heads per block: as many as keep this many output elements in the registers of a lane.
_MOST_ELEMENTS = 64
# Blocks wanted on the machine (132 multiprocessors on H100 and H200), and the most parts of a context.
_BLOCKS = 264
_MOST_SPLITS = 32
_SPLIT_MOST_ROWS = 64


def _score(p: AttentionParams, score: Any, distance: Any, slope: Any) -> Any:
    """Applies scale, soft cap and alibi to q.k; `distance` is j - position <= 0."""
    score = score * T.float32(p.scale)
    if p.softcap:
        # Not tanh.approx, which --use_fast_math would take: it is good for 11 bits only.
        score = tm.f32(p.softcap) * tm.tanh(score * tm.f32(1.0 / p.softcap))
    if p.has_alibi:
        score = score + slope * T.Cast("float32", distance)
    return score


def _first_position(p: AttentionParams, position: Any) -> Any:
    """Returns the first cache position a token at `position` sees."""
    return T.max(position - (p.window - 1), 0) if p.window else T.int32(0)


def _heads_per_block(p: AttentionParams, elements: int) -> int:
    """Returns the largest divisor of the group of query heads whose outputs fit the registers of a lane."""
    fitting = [size for size in range(1, p.group + 1) if p.group % size == 0 and size * elements <= _MOST_ELEMENTS]
    return max(fitting, default=1)


def _attention(case: Case, target: Target, splits: int) -> Any:
    p = AttentionParams.of(case)
    n, dtype = tm.rows(case), case.dtype
    D, Dv, P, Hkv = p.head_dim, p.v_head_dim, p.page_size, p.kv_heads
    L = min(vector_width(D, dtype), vector_width(Dv, dtype))
    chunks, v_chunks = D // L, Dv // L
    lanes = 1
    while lanes < min(chunks, WARP):
        lanes *= 2
    loads, v_loads = -(-chunks // lanes), -(-v_chunks // lanes)
    G = _heads_per_block(p, max(loads, v_loads) * L)
    head_blocks = p.heads // G
    groups = _THREADS // lanes
    S, U = splits, _KEYS
    num_pages, b, table = tm.symbol("num_pages"), tm.symbol("b"), tm.symbol("p")
    cross = [offset for offset in (1, 2, 4, 8, 16) if offset >= lanes]
    inner = [offset for offset in (1, 2, 4, 8, 16) if offset < lanes]
    part_rows = n * p.heads * S if S > 1 else 1

    @T.inline
    def merge(m, l, o, g, offset):
        """Merges the state of the lane `offset` away into this lane's."""
        other_m = T.alloc_buffer((1,), "float32", scope="local")
        top = T.alloc_buffer((1,), "float32", scope="local")
        mine = T.alloc_buffer((1,), "float32", scope="local")
        theirs = T.alloc_buffer((1,), "float32", scope="local")
        other_m[0] = shuffle_xor(m[g], offset)
        top[0] = T.max(m[g], other_m[0])
        mine[0] = T.exp(m[g] - top[0])
        theirs[0] = T.exp(other_m[0] - top[0])
        m[g] = top[0]
        l[g] = l[g] * mine[0] + shuffle_xor(l[g], offset) * theirs[0]
        for e in T.unroll(v_loads * L):
            o[g * v_loads * L + e] = (
                o[g * v_loads * L + e] * mine[0] + shuffle_xor(o[g * v_loads * L + e], offset) * theirs[0]
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
        part_o = T.alloc_buffer((part_rows, Dv), "float32")
        part_ml = T.alloc_buffer((part_rows, 2), "float32")
        for bx in T.thread_binding(n * head_blocks * S, thread="blockIdx.x"):
            for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                o_shared = T.alloc_buffer((_WARPS, G, Dv), "float32", scope="shared")
                m_shared = T.alloc_buffer((_WARPS, G), "float32", scope="shared")
                l_shared = T.alloc_buffer((_WARPS, G), "float32", scope="shared")
                packed = T.alloc_buffer((L,), dtype, scope="local")
                queries = T.alloc_buffer((G * loads * L,), "float32", scope="local")
                keys = T.alloc_buffer((U * loads * L,), dtype, scope="local")
                values = T.alloc_buffer((U * v_loads * L,), dtype, scope="local")
                scores = T.alloc_buffer((G * U,), "float32", scope="local")
                m = T.alloc_buffer((G,), "float32", scope="local")
                l = T.alloc_buffer((G,), "float32", scope="local")
                o = T.alloc_buffer((G * v_loads * L,), "float32", scope="local")
                top = T.alloc_buffer((1,), "float32", scope="local")
                total = T.alloc_buffer((1,), "float32", scope="local")
                rescale = T.alloc_buffer((1,), "float32", scope="local")
                t: T.let[T.int32] = T.Cast("int32", bx) // (head_blocks * S)
                head: T.let[T.int32] = T.Cast("int32", bx) // S % head_blocks * G
                h: T.let[T.int32] = head // p.group
                lane: T.let[T.int32] = tx % lanes
                position: T.let[T.int32] = positions[t]
                first: T.let[T.int32] = _first_position(p, position)
                span: T.let[T.int32] = (position + 1 - first + S - 1) // S
                begin: T.let[T.int32] = first + T.Cast("int32", bx) % S * span
                end: T.let[T.int32] = T.min(begin + span, position + 1)
                for g in T.unroll(G):
                    m[g] = T.float32(_NO_MAXIMUM)
                    l[g] = T.float32(0)
                    for c in T.unroll(loads):
                        for v in T.vectorized(L):
                            packed[v] = T.Cast(dtype, T.float32(0))
                        if c * lanes + lane < chunks:
                            for v in T.vectorized(L):
                                packed[v] = q[t, head + g, (c * lanes + lane) * L + v]
                        for v in T.unroll(L):
                            queries[(g * loads + c) * L + v] = T.Cast("float32", packed[v])
                    for e in T.unroll(v_loads * L):
                        o[g * v_loads * L + e] = T.float32(0)
                for step in range((T.max(end - begin, 0) + groups * U - 1) // (groups * U)):
                    start: T.let[T.int32] = begin + step * (groups * U) + tx // lanes
                    for u in T.unroll(U):
                        if start + u * groups < end:
                            j: T.let[T.int32] = start + u * groups
                            page: T.let[T.int32] = page_table[seq_of_token[t], j // P]
                            for c in T.unroll(loads):
                                if c * lanes + lane < chunks:
                                    for v in T.vectorized(L):
                                        keys[(u * loads + c) * L + v] = k_cache[
                                            page, h, j % P, (c * lanes + lane) * L + v
                                        ]
                                else:
                                    for v in T.vectorized(L):
                                        keys[(u * loads + c) * L + v] = T.Cast(dtype, T.float32(0))
                            for c in T.unroll(v_loads):
                                if c * lanes + lane < v_chunks:
                                    for v in T.vectorized(L):
                                        values[(u * v_loads + c) * L + v] = v_cache[
                                            page, h, j % P, (c * lanes + lane) * L + v
                                        ]
                                else:
                                    for v in T.vectorized(L):
                                        values[(u * v_loads + c) * L + v] = T.Cast(dtype, T.float32(0))
                        else:
                            for e in T.unroll(loads * L):
                                keys[u * loads * L + e] = T.Cast(dtype, T.float32(0))
                            for e in T.unroll(v_loads * L):
                                values[u * v_loads * L + e] = T.Cast(dtype, T.float32(0))
                    for g in T.unroll(G):
                        for u in T.unroll(U):
                            scores[g * U + u] = T.float32(0)
                            for e in T.unroll(loads * L):
                                scores[g * U + u] = scores[g * U + u] + queries[g * loads * L + e] * T.Cast(
                                    "float32", keys[u * loads * L + e]
                                )
                            for i in T.unroll(len(inner)):
                                scores[g * U + u] = scores[g * U + u] + shuffle_xor(scores[g * U + u], 1 << i)
                            scores[g * U + u] = T.if_then_else(
                                start + u * groups < end,
                                _score(
                                    p,
                                    scores[g * U + u],
                                    start + u * groups - position,
                                    alibi_slopes[head + g] if p.has_alibi else None,
                                ),
                                T.float32(_MASKED),
                            )
                        top[0] = m[g]
                        for u in T.unroll(U):
                            top[0] = T.max(top[0], scores[g * U + u])
                        rescale[0] = T.exp(m[g] - top[0])
                        m[g] = top[0]
                        l[g] = l[g] * rescale[0]
                        for e in T.unroll(v_loads * L):
                            o[g * v_loads * L + e] = o[g * v_loads * L + e] * rescale[0]
                        for u in T.unroll(U):
                            scores[g * U + u] = T.exp(scores[g * U + u] - top[0])
                            l[g] = l[g] + scores[g * U + u]
                            for e in T.unroll(v_loads * L):
                                o[g * v_loads * L + e] = o[g * v_loads * L + e] + scores[g * U + u] * T.Cast(
                                    "float32", values[u * v_loads * L + e]
                                )
                for g in T.unroll(G):
                    for i in T.unroll(len(cross)):
                        merge(m, l, o, g, lanes << i)
                    if tx % WARP < lanes:
                        for c in T.unroll(v_loads):
                            if c * lanes + lane < v_chunks:
                                for v in T.unroll(L):
                                    o_shared[tx // WARP, g, (c * lanes + lane) * L + v] = o[(g * v_loads + c) * L + v]
                    if tx % WARP == 0:
                        m_shared[tx // WARP, g] = m[g]
                        l_shared[tx // WARP, g] = l[g]
                T.tvm_storage_sync("shared")
                for g in T.unroll(G):
                    top[0] = T.float32(_NO_MAXIMUM)
                    total[0] = T.float32(0)
                    if p.has_sinks and S == 1:
                        top[0] = sinks[head + g]
                        total[0] = T.float32(1)
                    for w in T.unroll(_WARPS):
                        rescale[0] = T.max(top[0], m_shared[w, g])
                        total[0] = total[0] * T.exp(top[0] - rescale[0]) + l_shared[w, g] * T.exp(
                            m_shared[w, g] - rescale[0]
                        )
                        top[0] = rescale[0]
                    for step in range((Dv + _THREADS - 1) // _THREADS):
                        if step * _THREADS + tx < Dv:
                            rescale[0] = T.float32(0)
                            for w in T.unroll(_WARPS):
                                rescale[0] = rescale[0] + o_shared[w, g, step * _THREADS + tx] * T.exp(
                                    m_shared[w, g] - top[0]
                                )
                            if S == 1:
                                out[t, head + g, step * _THREADS + tx] = T.Cast(dtype, rescale[0] / total[0])
                            else:
                                part_o[(t * p.heads + head + g) * S + T.Cast("int32", bx) % S, step * _THREADS + tx] = (
                                    rescale[0]
                                )
                    if S > 1:
                        if tx == 0:
                            part_ml[(t * p.heads + head + g) * S + T.Cast("int32", bx) % S, 0] = top[0]
                            part_ml[(t * p.heads + head + g) * S + T.Cast("int32", bx) % S, 1] = total[0]
        if S > 1:
            for bx in T.thread_binding(n * p.heads, thread="blockIdx.x"):
                for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                    top = T.alloc_buffer((1,), "float32", scope="local")
                    total = T.alloc_buffer((1,), "float32", scope="local")
                    value = T.alloc_buffer((1,), "float32", scope="local")
                    top[0] = T.float32(_NO_MAXIMUM)
                    if p.has_sinks:
                        top[0] = sinks[bx % p.heads]
                    for s in range(S):
                        top[0] = T.max(top[0], part_ml[bx * S + s, 0])
                    total[0] = T.float32(0)
                    if p.has_sinks:
                        total[0] = T.exp(sinks[bx % p.heads] - top[0])
                    for s in range(S):
                        total[0] = total[0] + part_ml[bx * S + s, 1] * T.exp(part_ml[bx * S + s, 0] - top[0])
                    for step in range((Dv + _THREADS - 1) // _THREADS):
                        if step * _THREADS + tx < Dv:
                            value[0] = T.float32(0)
                            for s in range(S):
                                value[0] = value[0] + part_o[bx * S + s, step * _THREADS + tx] * T.exp(
                                    part_ml[bx * S + s, 0] - top[0]
                                )
                            out[bx // p.heads, bx % p.heads, step * _THREADS + tx] = T.Cast(dtype, value[0] / total[0])

    return tm.without_params(paged_attention, p.absent)


def _split(case: Case, target: Target) -> Any:
    rows: Any = case.rows  # known where the context is split
    blocks = rows * AttentionParams.of(case).kv_heads
    return _attention(case, target, max(2, min(_MOST_SPLITS, -(-_BLOCKS // blocks))))


def _accepts_split(case: Case, target: Target) -> Refusal | None:
    if case.rows is None or case.rows * AttentionParams.of(case).kv_heads > _BLOCKS // 2:
        return Refusal(
            f"is for few tokens, known at compile time (multiprocessors would be idle), not {case.rows or 'symbolic'}"
        )
    return refuse_attention(case)


def _accepts_append(case: Case, target: Target) -> Refusal | None:
    return refuse_dtype(case) or refuse_other_cache(case)


def _append(case: Case, target: Target) -> Any:
    """Copies k and v of each token to its slot, one block per token; a negative slot is skipped."""
    n, dtype = tm.rows(case), case.dtype
    H, D, P = int(case["kv_heads"]), int(case["head_dim"]), int(case.get("page_size", 16))
    Dv = int(case.get("v_head_dim", D))
    num_pages = tm.symbol("num_pages")
    KL, VL = vector_width(D, dtype), vector_width(Dv, dtype)
    k_chunks, v_chunks = H * D // KL, H * Dv // VL

    @T.prim_func(s_tir=True)
    def kv_append(
        k: T.Buffer((n, H, D), dtype),
        v: T.Buffer((n, H, Dv), dtype),
        slots: T.Buffer((n,), "int32"),
        k_cache: T.Buffer((num_pages, H, P, D), dtype),
        v_cache: T.Buffer((num_pages, H, P, Dv), dtype),
    ):
        for t in T.thread_binding(n, thread="blockIdx.x"):
            for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                slot: T.let[T.int32] = slots[t]
                if slot >= 0:
                    for step in range((k_chunks + _THREADS - 1) // _THREADS):
                        if step * _THREADS + tx < k_chunks:
                            e: T.let[T.int32] = (step * _THREADS + tx) * KL
                            for c in T.vectorized(KL):
                                k_cache[slot // P, e // D, slot % P, e % D + c] = k[t, e // D, e % D + c]
                    for step in range((v_chunks + _THREADS - 1) // _THREADS):
                        if step * _THREADS + tx < v_chunks:
                            e: T.let[T.int32] = (step * _THREADS + tx) * VL
                            for c in T.vectorized(VL):
                                v_cache[slot // P, e // Dv, slot % P, e % Dv + c] = v[t, e // Dv, e % Dv + c]

    return kv_append


KERNELS = (
    Kernel("cuda.paged_attention.split", "paged_attention", _accepts_split, _split),
    Kernel(
        "cuda.paged_attention.block",
        "paged_attention",
        lambda case, target: refuse_attention(case),
        lambda case, target: _attention(case, target, 1),
    ),
    Kernel("cuda.kv_append", "kv_append", _accepts_append, _append),
)
