# SPDX-License-Identifier: Apache-2.0
# TVMScript annotations are calls, which mypy does not take for types.
# mypy: disable-error-code="valid-type, no-redef"
# TVMScript decides Python conditions while parsing and must see them apart from those of the kernel.
# ruff: noqa: SIM102
"""Sampling for CUDA: one block per row of logits; see `sampling_math` for the method, `reference` for the rules.

A bisection step over a whole vocabulary costs microseconds, so the tokens that can decide a threshold are gathered in
shared memory first. For top_k these are the logits not below the k-th largest of the threads' own maxima (there are k
logits at least that large, one per thread). For top_p they are the tokens heavier than (1 - top_p) * total / V, since
all lighter ones together weigh less than what top_p drops. If they do not fit, steps go over the row instead.
"""

from __future__ import annotations

from typing import Any

from gptq_compile.kernels import sampling_math as sm
from gptq_compile.kernels import tirx_math as tm
from gptq_compile.kernels.cpu.sampling import vocabulary
from gptq_compile.kernels.cuda.block import WARP, block_max, block_sum, shuffle_xor
from gptq_compile.kernels.registry import Case, Kernel
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import T

_THREADS = 512
_WARPS = _THREADS // WARP
# Loads of 16 bytes that a thread has under way while it looks for the largest logit: a block that waits for each of
# them takes 16 us for 128,256 logits.
_AHEAD = 8
# Gathered logits: 32 KiB of shared memory.
_GATHERED = 8192


def _sample(case: Case, target: Target) -> Any:
    b, V, N, M, A = tm.rows(case, "b"), vocabulary(case), _THREADS, _GATHERED, _AHEAD
    L = tm.lanes(V, 4)

    @T.inline
    def items_from(result, values, count, low, top, divisor, weighted, shared, tx):
        """result[0] = how many (or how heavy) the `count` values >= low are."""
        result[0] = T.int64(0)
        for i in range((count + N - 1) // N):
            if i * N + tx < count:
                if weighted:
                    result[0] = result[0] + T.Cast("int64", sm.weight(values[i * N + tx], low, top, divisor))
                else:
                    result[0] = result[0] + T.Select(values[i * N + tx] >= low, T.int64(1), T.int64(0))
        block_sum(result, shared, tx, N)

    @T.inline
    def gather(size, gathered, counter, logits, row, low, tx):
        """gathered[: size[0]] = the logits >= low in any order; size[0] counts on when they do not fit."""
        T.tvm_storage_sync("shared")
        if tx == 0:
            counter[0] = 0
        T.tvm_storage_sync("shared")
        place = T.alloc_buffer((1,), "int32", scope="local")
        for i in range((V + N - 1) // N):
            if i * N + tx < V:
                if logits[row, i * N + tx] >= low:
                    place[0] = T.call_extern("int32", "atomicAdd", T.address_of(counter[0]), 1)
                    if place[0] < M:
                        gathered[place[0]] = logits[row, i * N + tx]
        T.tvm_storage_sync("shared")
        size[0] = counter[0]

    @T.inline
    def bisect(least, beyond, result, wanted, gathered, size, logits, row, top, divisor, weighted, shared, tx):
        """least[0] = the largest key with at least `wanted` of items_from; it holds for least[0], not for beyond[0]."""
        while beyond[0] - least[0] > T.int64(1):
            middle: T.let[T.int64] = (least[0] + beyond[0]) >> T.int64(1)
            if size[0] <= M:
                items_from(result, gathered, size[0], sm.value_of(middle), top, divisor, weighted, shared, tx)
            else:
                result[0] = T.int64(0)
                for i in range((V + N - 1) // N):
                    if i * N + tx < V:
                        if logits[row, i * N + tx] >= sm.value_of(middle):
                            if weighted:
                                result[0] = result[0] + T.Cast(
                                    "int64", sm.weight(logits[row, i * N + tx], sm.value_of(middle), top, divisor)
                                )
                            else:
                                result[0] = result[0] + T.int64(1)
                block_sum(result, shared, tx, N)
            if result[0] >= wanted:
                least[0] = middle
                if not weighted:
                    # Exactly as many as wanted: no need to find the smallest of them.
                    if result[0] == wanted:
                        beyond[0] = middle
            else:
                beyond[0] = middle

    @T.prim_func(s_tir=True)
    def sample(
        logits: T.Buffer((b, V), "float32"),
        temperature: T.Buffer((b,), "float32"),
        top_k: T.Buffer((b,), "int32"),
        top_p: T.Buffer((b,), "float32"),
        min_p: T.Buffer((b,), "float32"),
        seeds: T.Buffer((b,), "int32"),
        positions: T.Buffer((b,), "int32"),
        out: T.Buffer((b,), "int32"),
    ):
        for row in T.thread_binding(b, thread="blockIdx.x"):
            for tx in T.thread_binding(N, thread="threadIdx.x"):
                gathered = T.alloc_buffer((M,), "float32", scope="shared")
                counter = T.alloc_buffer((1,), "int32", scope="shared")
                shared_f = T.alloc_buffer((_WARPS,), "float32", scope="shared")
                shared_i = T.alloc_buffer((_WARPS,), "int64", scope="shared")
                mine = T.alloc_buffer((1,), "float32", scope="local")
                best = T.alloc_buffer((1,), "int32", scope="local")
                bad = T.alloc_buffer((1,), "int32", scope="local")
                several = T.alloc_buffer((A * L,), "float32", scope="local")
                top = T.alloc_buffer((1,), "float32", scope="local")
                low = T.alloc_buffer((1,), "float32", scope="local")
                result = T.alloc_buffer((1,), "int64", scope="local")
                least = T.alloc_buffer((1,), "int64", scope="local")
                beyond = T.alloc_buffer((1,), "int64", scope="local")
                left = T.alloc_buffer((1,), "int64", scope="local")
                prefix = T.alloc_buffer((1,), "int64", scope="local")
                begin = T.alloc_buffer((1,), "int32", scope="local")
                size = T.alloc_buffer((1,), "int32", scope="local")
                # Minus infinity: the bound for top_k needs a maximum of the thread's own logits.
                mine[0] = T.reinterpret("float32", T.uint32(0xFF800000))
                best[0] = 0
                bad[0] = 0
                for i in range((V + N * L * A - 1) // (N * L * A)):
                    for j in T.unroll(A):
                        for v in T.vectorized(L):
                            several[j * L + v] = T.reinterpret("float32", T.uint32(0xFF800000))
                        if ((i * A + j) * N + tx) * L < V:
                            for v in T.vectorized(L):
                                several[j * L + v] = logits[row, ((i * A + j) * N + tx) * L + v]
                    for j in T.unroll(A):
                        for v in T.unroll(L):
                            bad[0] = bad[0] + T.Cast("int32", sm.invalid(several[j * L + v]))
                            if several[j * L + v] > mine[0]:
                                mine[0] = several[j * L + v]
                                best[0] = ((i * A + j) * N + tx) * L + v
                result[0] = T.Cast("int64", bad[0])
                top[0] = mine[0]
                block_max(top, shared_f, tx, N)
                block_sum(result, shared_i, tx, N)
                if result[0] > T.int64(0) or top[0] < T.float32(sm.LOWEST):
                    if tx == 0:
                        out[row] = -1
                else:
                    if temperature[row] <= T.float32(0):
                        # The largest of minus the index is the lowest index; every thread kept the first of its own.
                        result[0] = T.Select(
                            mine[0] == top[0], T.int64(0) - T.Cast("int64", best[0]), T.int64(-(1 << 40))
                        )
                        block_max(result, shared_i, tx, N)
                        if tx == 0:
                            out[row] = T.Cast("int32", T.int64(0) - result[0])
                    else:
                        divisor: T.let[T.float32] = temperature[row]
                        low[0] = T.max(top[0] - T.float32(sm.WEIGHTLESS) * divisor, T.float32(sm.LOWEST))
                        if top_k[row] > 0 and top_k[row] < V:
                            wanted: T.let[T.int64] = T.Cast("int64", top_k[row])
                            least[0] = T.int64(sm.LEAST_KEY)
                            if top_k[row] <= N:
                                # The k-th largest of the threads' maxima bounds the k-th largest logit from below.
                                beyond[0] = sm.key_of(top[0]) + T.int64(1)
                                while beyond[0] - least[0] > T.int64(1):
                                    middle: T.let[T.int64] = (least[0] + beyond[0]) >> T.int64(1)
                                    result[0] = T.Select(mine[0] >= sm.value_of(middle), T.int64(1), T.int64(0))
                                    block_sum(result, shared_i, tx, N)
                                    if result[0] >= wanted:
                                        least[0] = middle
                                        if result[0] == wanted:
                                            beyond[0] = middle
                                    else:
                                        beyond[0] = middle
                            gather(size, gathered, counter, logits, row, sm.value_of(least[0]), tx)
                            beyond[0] = sm.key_of(top[0]) + T.int64(1)
                            bisect(
                                least,
                                beyond,
                                result,
                                wanted,
                                gathered,
                                size,
                                logits,
                                row,
                                top[0],
                                divisor,
                                False,
                                shared_i,
                                tx,
                            )
                            low[0] = T.max(low[0], sm.value_of(least[0]))
                        if top_p[row] < T.float32(1):
                            result[0] = T.int64(0)
                            for i in range((V + N - 1) // N):
                                if i * N + tx < V:
                                    result[0] = result[0] + T.Cast(
                                        "int64", sm.weight(logits[row, i * N + tx], low[0], top[0], divisor)
                                    )
                            block_sum(result, shared_i, tx, N)
                            total: T.let[T.int64] = result[0]
                            least[0] = sm.key_of(low[0])
                            # A hundredth below the bound, against the rounding of log.
                            bound: T.let[T.float32] = top[0] + divisor * (
                                T.log(
                                    (T.float32(1) - top_p[row])
                                    * T.Cast("float32", total)
                                    / (T.float32(sm.WEIGHT_ONE) * T.Cast("float32", V))
                                )
                                - T.float32(0.01)
                            )
                            if bound > low[0]:
                                least[0] = sm.key_of(T.min(bound, top[0]))
                            gather(size, gathered, counter, logits, row, sm.value_of(least[0]), tx)
                            beyond[0] = sm.key_of(top[0]) + T.int64(1)
                            bisect(
                                least,
                                beyond,
                                result,
                                sm.wanted_mass(total, top_p[row]),
                                gathered,
                                size,
                                logits,
                                row,
                                top[0],
                                divisor,
                                True,
                                shared_i,
                                tx,
                            )
                            low[0] = sm.value_of(least[0])
                        lightest: T.let[T.int32] = sm.lightest_weight(min_p[row])
                        # Every warp weighs its own stretch of the vocabulary.
                        stretch: T.let[T.int32] = T.Cast("int32", (V + _WARPS * WARP - 1) // (_WARPS * WARP)) * WARP
                        begin[0] = tx // WARP * stretch
                        result[0] = T.int64(0)
                        for i in range(stretch // WARP):
                            if begin[0] + i * WARP + tx % WARP < V:
                                result[0] = result[0] + T.Cast(
                                    "int64",
                                    sm.kept(
                                        logits[row, begin[0] + i * WARP + tx % WARP],
                                        low[0],
                                        top[0],
                                        divisor,
                                        lightest,
                                    ),
                                )
                        for step in T.unroll(5):
                            result[0] = result[0] + shuffle_xor(result[0], 1 << step)
                        T.tvm_storage_sync("shared")
                        if tx % WARP == 0:
                            shared_i[tx // WARP] = result[0]
                        T.tvm_storage_sync("shared")
                        result[0] = T.int64(0)
                        for warp in range(_WARPS):
                            result[0] = result[0] + shared_i[warp]
                        left[0] = sm.draw_target(result[0], sm.random_bits(seeds[row], positions[row]))
                        # Find the stretch that holds the drawn point; its warp then walks it, a token per lane.
                        begin[0] = -1
                        for warp in range(_WARPS):
                            if begin[0] < 0:
                                result[0] = shared_i[warp]
                                if left[0] < result[0]:
                                    begin[0] = warp
                                else:
                                    left[0] = left[0] - result[0]
                        if tx // WARP == begin[0]:
                            begin[0] = begin[0] * stretch
                            while left[0] >= T.int64(0):
                                result[0] = T.int64(0)
                                if begin[0] + tx % WARP < V:
                                    result[0] = T.Cast(
                                        "int64",
                                        sm.kept(logits[row, begin[0] + tx % WARP], low[0], top[0], divisor, lightest),
                                    )
                                prefix[0] = result[0]
                                for step in T.unroll(5):
                                    beyond[0] = T.tvm_warp_shuffle_up(
                                        T.uint32(0xFFFFFFFF), prefix[0], 1 << step, WARP, WARP
                                    )
                                    if tx % WARP >= 1 << step:
                                        prefix[0] = prefix[0] + beyond[0]
                                if prefix[0] > left[0] and prefix[0] - result[0] <= left[0]:
                                    out[row] = begin[0] + tx % WARP
                                left[0] = left[0] - T.tvm_warp_shuffle(
                                    T.uint32(0xFFFFFFFF), prefix[0], WARP - 1, WARP, WARP
                                )
                                begin[0] = begin[0] + WARP

    return sample


def _repetition_penalty(case: Case, target: Target) -> Any:
    b, V, threads = tm.rows(case, "b"), vocabulary(case), 256

    @T.prim_func(s_tir=True)
    def repetition_penalty(
        logits: T.Buffer((b, V), "float32"), seen: T.Buffer((b, V), "uint8"), penalty: T.Buffer((b,), "float32")
    ):
        for row in T.thread_binding(b, thread="blockIdx.x"):
            for by in T.thread_binding((V + threads - 1) // threads, thread="blockIdx.y"):
                for tx in T.thread_binding(threads, thread="threadIdx.x"):
                    if by * threads + tx < V:
                        logits[row, by * threads + tx] = sm.penalized(
                            logits[row, by * threads + tx], seen[row, by * threads + tx], penalty[row]
                        )

    return repetition_penalty


def _mark_seen(case: Case, target: Target) -> Any:
    b, V = tm.rows(case, "b"), vocabulary(case)

    @T.prim_func(s_tir=True)
    def mark_seen(seen: T.Buffer((b, V), "uint8"), tokens: T.Buffer((b,), "int32")):
        for block in T.thread_binding((b + WARP - 1) // WARP, thread="blockIdx.x"):
            for tx in T.thread_binding(WARP, thread="threadIdx.x"):
                if block * WARP + tx < b:
                    if tokens[block * WARP + tx] >= 0 and tokens[block * WARP + tx] < V:
                        seen[block * WARP + tx, tokens[block * WARP + tx]] = T.uint8(1)

    return mark_seen


def _advance(case: Case, target: Target) -> Any:
    b, P = tm.rows(case, "b"), int(case.get("page_size", 16))
    pages = tm.symbol("p")

    @T.prim_func(s_tir=True)
    def advance(
        tokens: T.Buffer((b,), "int32"),
        page_table: T.Buffer((b, pages), "int32"),
        input_ids: T.Buffer((b,), "int32"),
        positions: T.Buffer((b,), "int32"),
        slots: T.Buffer((b,), "int32"),
    ):
        for block in T.thread_binding((b + WARP - 1) // WARP, thread="blockIdx.x"):
            for tx in T.thread_binding(WARP, thread="threadIdx.x"):
                if block * WARP + tx < b:
                    following: T.let[T.int32] = positions[block * WARP + tx] + 1
                    input_ids[block * WARP + tx] = T.max(tokens[block * WARP + tx], 0)
                    positions[block * WARP + tx] = following
                    slots[block * WARP + tx] = -1
                    if following // P < pages:
                        slots[block * WARP + tx] = page_table[block * WARP + tx, following // P] * P + following % P

    return advance


KERNELS = (
    Kernel("cuda.sample", "sample", lambda case, target: None, _sample),
    Kernel("cuda.repetition_penalty", "repetition_penalty", lambda case, target: None, _repetition_penalty),
    Kernel("cuda.mark_seen", "mark_seen", lambda case, target: None, _mark_seen),
    Kernel("cuda.advance", "advance", lambda case, target: None, _advance),
)
