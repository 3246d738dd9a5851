# SPDX-License-Identifier: Apache-2.0
# TVMScript annotations are calls, which mypy does not take for types.
# mypy: disable-error-code="valid-type, no-redef"
"""Sampling on the CPU: one row of logits per task; see `sampling_math` for the method and `reference` for the rules."""

from __future__ import annotations

from typing import Any

from gptq_compile.kernels import sampling_math as sm
from gptq_compile.kernels import tirx_math as tm
from gptq_compile.kernels.registry import Case, Kernel
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import T

_LANES = 8
# Tokens per step of the search for the drawn one.
_CHUNK = 256


def vocabulary(case: Case) -> Any:
    """Returns the vocabulary size of `case`, or a symbol when the case does not fix it."""
    size = case.get("vocab_size")
    return tm.symbol("vocab_size") if size is None else int(size)


def _sample(case: Case, target: Target) -> Any:
    b, V, L, C = tm.rows(case, "b"), vocabulary(case), _LANES, _CHUNK

    @T.inline
    def count_from(result, logits, row, low, lanes):
        """result[0] = how many logits of the row are >= low."""
        for v in T.vectorized(L):
            lanes[v] = T.int32(0)
        for i in range(V // L):
            for v in T.vectorized(L):
                lanes[v] = lanes[v] + T.Select(logits[row, i * L + v] >= low, T.int32(1), T.int32(0))
        result[0] = T.int64(0)
        for v in T.unroll(L):
            result[0] = result[0] + T.Cast("int64", lanes[v])
        for i in range(V % L):
            result[0] = result[0] + T.Select(logits[row, V // L * L + i] >= low, T.int64(1), T.int64(0))

    @T.inline
    def mass_from(result, logits, row, low, weights, lanes):
        """result[0] = the sum of the weights of the logits >= low."""
        for v in T.vectorized(L):
            lanes[v] = T.int64(0)
        for i in range(V // L):
            for v in T.vectorized(L):
                lanes[v] = lanes[v] + T.Cast(
                    "int64", T.Select(logits[row, i * L + v] >= low, weights[i * L + v], T.int32(0))
                )
        result[0] = T.int64(0)
        for v in T.unroll(L):
            result[0] = result[0] + lanes[v]
        for i in range(V % L):
            result[0] = result[0] + T.Cast(
                "int64", T.Select(logits[row, V // L * L + i] >= low, weights[V // L * L + i], T.int32(0))
            )

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
        for row in T.parallel(b):
            weights = T.alloc_buffer((V,), "int32")
            tops = T.alloc_buffer((L,), "float32")
            bad = T.alloc_buffer((L,), "int32")
            sums = T.alloc_buffer((L,), "int64")
            total = T.alloc_buffer((1,), "int64")
            top: T.float32 = logits[row, 0]
            invalid: T.int32 = T.int32(0)
            for v in T.vectorized(L):
                tops[v] = logits[row, 0]
                bad[v] = T.int32(0)
            for i in range(V // L):
                for v in T.vectorized(L):
                    tops[v] = T.max(tops[v], logits[row, i * L + v])
                    bad[v] = bad[v] + sm.invalid(logits[row, i * L + v])
            for v in T.unroll(L):
                top = T.max(top, tops[v])
                invalid = invalid + bad[v]
            for i in range(V % L):
                top = T.max(top, logits[row, V // L * L + i])
                invalid = invalid + sm.invalid(logits[row, V // L * L + i])
            token: T.int32 = T.int32(-1)
            if invalid == 0 and top >= T.float32(sm.LOWEST):
                token = T.int32(0)
                if temperature[row] <= T.float32(0):
                    while logits[row, token] != top:
                        token = token + 1
                else:
                    divisor: T.let[T.float32] = temperature[row]
                    # Below this the weight rounds to 0.
                    low: T.float32 = T.max(top - T.float32(sm.WEIGHTLESS) * divisor, T.float32(sm.LOWEST))
                    if top_k[row] > 0 and top_k[row] < V:
                        least: T.int64 = T.int64(sm.LEAST_KEY)
                        beyond: T.int64 = sm.key_of(top) + T.int64(1)
                        while beyond - least > T.int64(1):
                            middle: T.let[T.int64] = (least + beyond) >> T.int64(1)
                            count_from(total, logits, row, sm.value_of(middle), bad)
                            if total[0] >= T.Cast("int64", top_k[row]):
                                least = middle
                                if total[0] == T.Cast("int64", top_k[row]):
                                    beyond = middle
                            else:
                                beyond = middle
                        low = T.max(low, sm.value_of(least))
                    for i in range(V // L):
                        for v in T.vectorized(L):
                            weights[i * L + v] = sm.weight(logits[row, i * L + v], low, top, divisor)
                    for i in range(V % L):
                        weights[V // L * L + i] = sm.weight(logits[row, V // L * L + i], low, top, divisor)
                    if top_p[row] < T.float32(1):
                        mass_from(total, logits, row, low, weights, sums)
                        wanted: T.let[T.int64] = sm.wanted_mass(total[0], top_p[row])
                        least: T.int64 = sm.key_of(low)
                        beyond: T.int64 = sm.key_of(top) + T.int64(1)
                        while beyond - least > T.int64(1):
                            middle: T.let[T.int64] = (least + beyond) >> T.int64(1)
                            mass_from(total, logits, row, sm.value_of(middle), weights, sums)
                            if total[0] >= wanted:
                                least = middle
                            else:
                                beyond = middle
                        low = sm.value_of(least)
                    lightest: T.let[T.int32] = sm.lightest_weight(min_p[row])
                    for i in range(V // L):
                        for v in T.vectorized(L):
                            weights[i * L + v] = T.Select(
                                T.And(logits[row, i * L + v] >= low, weights[i * L + v] >= lightest),
                                weights[i * L + v],
                                T.int32(0),
                            )
                    for i in range(V % L):
                        if logits[row, V // L * L + i] < low or weights[V // L * L + i] < lightest:
                            weights[V // L * L + i] = T.int32(0)
                    mass_from(total, logits, row, low, weights, sums)
                    left: T.int64 = sm.draw_target(total[0], sm.random_bits(seeds[row], positions[row]))
                    chunk: T.int64 = T.int64(0)
                    # token: the first whose cumulative weight exceeds the drawn point; skip whole chunks before it.
                    while token + C <= V and chunk <= left:
                        chunk = T.int64(0)
                        for i in range(C):
                            chunk = chunk + T.Cast("int64", weights[token + i])
                        if chunk <= left:
                            left = left - chunk
                            token = token + C
                    while T.Cast("int64", weights[token]) <= left:
                        left = left - T.Cast("int64", weights[token])
                        token = token + 1
            out[row] = token

    return sample


def _repetition_penalty(case: Case, target: Target) -> Any:
    b, V, L = tm.rows(case, "b"), vocabulary(case), _LANES

    @T.prim_func(s_tir=True)
    def repetition_penalty(
        logits: T.Buffer((b, V), "float32"), seen: T.Buffer((b, V), "uint8"), penalty: T.Buffer((b,), "float32")
    ):
        for row in T.parallel(b):
            if penalty[row] != T.float32(1):
                for i in range(V // L):
                    for v in T.vectorized(L):
                        logits[row, i * L + v] = sm.penalized(
                            logits[row, i * L + v], seen[row, i * L + v], penalty[row]
                        )
                for i in range(V % L):
                    logits[row, V // L * L + i] = sm.penalized(
                        logits[row, V // L * L + i], seen[row, V // L * L + i], penalty[row]
                    )

    return repetition_penalty


def _mark_seen(case: Case, target: Target) -> Any:
    b, V = tm.rows(case, "b"), vocabulary(case)

    @T.prim_func(s_tir=True)
    def mark_seen(seen: T.Buffer((b, V), "uint8"), tokens: T.Buffer((b,), "int32")):
        for row in T.serial(b):
            if tokens[row] >= 0 and tokens[row] < V:
                seen[row, tokens[row]] = T.uint8(1)

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
        for row in T.serial(b):
            following: T.let[T.int32] = positions[row] + 1
            input_ids[row] = T.max(tokens[row], 0)
            positions[row] = following
            slots[row] = -1
            if following // P < pages:
                slots[row] = page_table[row, following // P] * P + following % P

    return advance


KERNELS = (
    Kernel("cpu.sample", "sample", lambda case, target: None, _sample),
    Kernel("cpu.repetition_penalty", "repetition_penalty", lambda case, target: None, _repetition_penalty),
    Kernel("cpu.mark_seen", "mark_seen", lambda case, target: None, _mark_seen),
    Kernel("cpu.advance", "advance", lambda case, target: None, _advance),
)
