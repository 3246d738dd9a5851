# SPDX-License-Identifier: Apache-2.0
"""Attention of few tokens on the CPU: the context is split over the threads (flash decoding, Dao et al. 2023).

A task is a token, a key head and a part of the context; all query heads of the key head share what is read. Tasks run
the online softmax of FlashAttention (Dao et al. 2022, algorithm 1) over chunks of keys, and their parts are put
together at the end. Short contexts are not worth waking threads for, and stay on one.
"""

from __future__ import annotations

import operator
from typing import Any

from gptq_compile.kernels import tirx_math as tm
from gptq_compile.kernels.cpu.attention_parts import (
    MASKED,
    NO_MAXIMUM,
    Arguments,
    accumulators,
    divisor,
    each,
    fill,
    held,
    refuse,
    vectors,
)
from gptq_compile.kernels.cpu.cache import fold
from gptq_compile.kernels.registry import Case, Kernel, Refusal
from gptq_compile.kernels.script import Expr, Function, on_stack, script, store, when
from gptq_compile.kernels.target import Target

TASKS = 32
"""About as many tasks exist whatever the batch and the number of heads."""
MOST_ROWS = 16
SERIAL_PRODUCTS = 1 << 18
"""Multiplications of queries and keys below which one thread is faster."""


def _accepts(case: Case, target: Target) -> Refusal | None:
    if case.rows is None or case.rows > MOST_ROWS:
        return Refusal(f"is for 1 to {MOST_ROWS} tokens known at compile time, not {case.rows or 'symbolic'}")
    return refuse(case)


class _Decode:
    """Emits the parts of the kernel."""

    def __init__(self, a: Arguments, target: Target) -> None:
        ir, p = script(), a.p
        self.a = a
        self.tokens = int(a.n)
        self.splits = max(1, -(-TASKS // (self.tokens * p.kv_heads)))
        self.tasks = self.tokens * p.kv_heads * self.splits
        most = accumulators(target)
        # Query heads in a register tile, and pages or vectors of values beside them.
        self.heads = divisor(p.group, max(1, most // (p.page_size // a.key_lanes)))
        self.pages = divisor(a.chunk_pages, most // (self.heads * (p.page_size // a.key_lanes)))
        self.columns = divisor(p.v_head_dim // a.value_lanes, most // self.heads)
        self.largest = ir.alloc_buffer((self.tasks, p.group), "float32")
        self.sums = ir.alloc_buffer((self.tasks, p.group), "float32")
        self.outs = ir.alloc_buffer((self.tasks, p.group, p.v_head_dim), "float32")

    def small(self) -> Expr:
        """Emits the counting of what there is to do; whether that is little."""
        ir, a, p = script(), self.a, self.a.p
        keys = on_stack(1, "int32")
        store(keys, (0,), ir.int32(0))
        with ir.serial(self.tokens) as t:
            store(keys, (0,), keys[0] + a.positions[t] - a.first(a.positions[t]) + 1)
        return keys[0] <= SERIAL_PRODUCTS // (p.heads * p.head_dim)

    def task(self, number: Expr) -> None:
        """Emits one task."""
        ir, a, p = script(), self.a, self.a.p
        task = held(number)
        token, head = held(task // (p.kv_heads * self.splits)), held(task // self.splits % p.kv_heads)
        position = held(a.positions[token])
        first = held(a.first(position))
        start, stop = first // p.page_size, position // p.page_size + 1
        chunks = held((stop - start + a.chunk_pages - 1) // a.chunk_pages)
        part = task % self.splits
        begin, end = held(chunks * part // self.splits), held(chunks * (part + 1) // self.splits)
        with ir.serial(p.group) as g:
            store(self.largest, (task, g), ir.float32(NO_MAXIMUM))
            store(self.sums, (task, g), ir.float32(0))
        with when(begin < end):
            queries = ir.alloc_buffer((p.group, p.head_dim), "float32")
            scores = ir.alloc_buffer((p.group, a.chunk), "float32")
            rescale = ir.alloc_buffer((p.group,), "float32")
            with ir.serial(p.group) as g:
                a.load_query(queries, g, token, head * p.group + g)
                with each(p.v_head_dim, a.value_lanes) as at:
                    store(self.outs, (task, g, at), ir.float32(0))
            with ir.serial(end - begin) as chunk:
                base = held(start + (begin + chunk) * a.chunk_pages)
                count = held(ir.min(stop - base, a.chunk_pages))
                physical = on_stack(a.chunk_pages, "int32")
                for c in range(a.chunk_pages):  # what lies beyond the last page is masked
                    page = a.table[a.sequences[token], base + ir.min(c, count - 1)]
                    store(physical, (c,), page)
                self._scores(queries, scores, physical, head)
                with ir.serial(p.group) as g:
                    self._softmax(task, g, scores, rescale, physical, head, base, position)
                self._mix(task, scores, rescale, physical, head, base, count, first, position)

    def _scores(self, queries: Any, scores: Any, physical: Any, head: Expr) -> None:
        """Emits the products of queries and keys of a chunk: ``scores[group, chunk]``."""
        ir, a, p = script(), self.a, self.a.p
        lanes, parts = a.key_lanes, p.page_size // a.key_lanes
        with ir.serial(p.group // self.heads) as tile, ir.serial(a.chunk_pages // self.pages) as block:
            pages = [held(physical[block * self.pages + c]) for c in range(self.pages)]
            places = [(c, s * lanes) for c in range(self.pages) for s in range(parts)]
            sums = [vectors(len(places), lanes) for _ in range(self.heads)]
            for row in sums:
                for array in row:
                    fill(array, lanes, 0)
            key = on_stack(lanes)
            with ir.serial(p.head_dim) as d:
                for i, (c, at) in enumerate(places):
                    with ir.vectorized(lanes) as lane:
                        store(key, (lane,), a.keys.value(pages[c], head, at + lane, d))
                    for g in range(self.heads):
                        with ir.vectorized(lanes) as lane:
                            query = queries[tile * self.heads + g, d]
                            store(sums[g][i], (lane,), sums[g][i][lane] + query * key[lane])
            for i, (c, at) in enumerate(places):
                for g in range(self.heads):
                    with ir.vectorized(lanes) as lane:
                        where = (block * self.pages + c) * p.page_size + at + lane
                        store(scores, (tile * self.heads + g, where), sums[g][i][lane])

    def _softmax(
        self, task: Expr, g: Expr, scores: Any, rescale: Any, physical: Any, head: Expr, base: Expr, position: Expr
    ) -> None:
        """Emits the weights of a row of a chunk, and what the sums so far are multiplied by."""
        ir, a, p = script(), self.a, self.a.p
        lanes, per_page = a.key_lanes, p.page_size // a.key_lanes
        most, total = on_stack(lanes), on_stack(lanes)
        fill(most, lanes, MASKED)
        fill(total, lanes, 0)
        with ir.serial(a.chunk // lanes) as i:
            with ir.vectorized(lanes) as lane:
                value = scores[g, i * lanes + lane]
                if a.keys.scaled:
                    value = value * a.keys.scale(physical[i // per_page], head, i % per_page * lanes + lane)
                value = a.score(value, base * p.page_size + i * lanes + lane, position, head * p.group + g)
                store(scores, (g, i * lanes + lane), value)
            with ir.vectorized(lanes) as lane:
                store(most, (lane,), ir.max(most[lane], scores[g, i * lanes + lane]))
        top = held(ir.max(self.largest[task, g], fold(most, lanes, ir.max)), "float32")
        store(rescale, (g,), tm.exp(self.largest[task, g] - top))
        store(self.largest, (task, g), top)
        with ir.serial(a.chunk // lanes) as i:
            weight = on_stack(lanes)
            with ir.vectorized(lanes) as lane:
                store(weight, (lane,), tm.exp(scores[g, i * lanes + lane] - top))
            with ir.vectorized(lanes) as lane:
                store(total, (lane,), total[lane] + weight[lane])
            with ir.vectorized(lanes) as lane:
                value = weight[lane]
                if a.values.scaled:
                    value = value * a.values.scale(physical[i // per_page], head, i % per_page * lanes + lane)
                store(scores, (g, i * lanes + lane), value)
        store(self.sums, (task, g), self.sums[task, g] * rescale[g] + fold(total, lanes, operator.add))

    def _mix(
        self, task: Expr, scores: Any, rescale: Any, physical: Any, head: Expr, base: Expr, count: Expr, first: Expr,
        position: Expr,
    ) -> None:  # fmt: skip
        """Emits the sums of the values of a chunk, never of one that the token does not see."""
        ir, a, p = script(), self.a, self.a.p
        lanes = a.value_lanes
        wide = self.columns * lanes
        with ir.serial(p.group // self.heads) as tile, ir.serial(p.v_head_dim // wide) as column:
            sums = [vectors(self.columns, lanes) for _ in range(self.heads)]

            def every(emit: Any, sums: Any = sums, tile: Expr = tile, column: Expr = column) -> None:
                for g in range(self.heads):
                    for i in range(self.columns):
                        with ir.vectorized(lanes) as lane:
                            emit(sums[g][i], tile * self.heads + g, column * wide + i * lanes + lane, lane)

            every(lambda s, row, at, lane: store(s, (lane,), self.outs[task, row, at] * rescale[row]))
            with ir.serial(count) as c:
                low = ir.max(first - (base + c) * p.page_size, 0)
                high = ir.min(position - (base + c) * p.page_size + 1, p.page_size)
                page = held(physical[c])
                with ir.serial(high - low) as j:
                    value = on_stack(lanes)
                    for i in range(self.columns):
                        with ir.vectorized(lanes) as lane:
                            at = column * wide + i * lanes + lane
                            store(value, (lane,), a.values.value(page, head, low + j, at))
                        for g in range(self.heads):
                            weight = scores[tile * self.heads + g, c * p.page_size + low + j]
                            with ir.vectorized(lanes) as lane:
                                store(sums[g][i], (lane,), sums[g][i][lane] + weight * value[lane])
            every(lambda s, row, at, lane: store(self.outs, (task, row, at), s[lane]))

    def combine(self, row: Expr) -> None:
        """Emits the result of one head of a token, out of those of its parts."""
        ir, a, p = script(), self.a, self.a.p
        token, head = held(row // p.heads), held(row % p.heads)
        start, g = held((token * p.kv_heads + head // p.group) * self.splits), head % p.group
        top, total = on_stack(1), on_stack(1)
        store(top, (0,), ir.float32(NO_MAXIMUM))
        if a.sinks is not None:
            store(top, (0,), a.sinks[head])
        with ir.serial(self.splits) as s:
            store(top, (0,), ir.max(top[0], self.largest[start + s, g]))
        store(total, (0,), ir.float32(0) if a.sinks is None else tm.exp(a.sinks[head] - top[0]))
        weights = ir.alloc_buffer((self.splits,), "float32")
        with ir.serial(self.splits) as s:
            store(weights, (s,), tm.exp(self.largest[start + s, g] - top[0]))
            store(total, (0,), total[0] + self.sums[start + s, g] * weights[s])
        out = on_stack(a.value_lanes)
        with ir.serial(p.v_head_dim // a.value_lanes) as i:
            fill(out, a.value_lanes, 0)
            with ir.serial(self.splits) as s:
                there = self.sums[start + s, g] != ir.float32(0)  # else there is not even a zero
                with when(there), ir.vectorized(a.value_lanes) as lane:
                    part = self.outs[start + s, g, i * a.value_lanes + lane]
                    store(out, (lane,), out[lane] + weights[s] * part)
            with ir.vectorized(a.value_lanes) as lane:
                value = out[lane] / total[0]
                store(a.out, (token, head, i * a.value_lanes + lane), ir.cast(value, a.dtype))


def _build(case: Case, target: Target) -> Any:
    ir = script()
    with Function("paged_attention") as f:
        decode = _Decode(Arguments(f, case, target), target)
        small = decode.small()
        with ir.If(small):
            with ir.Then(), ir.serial(decode.tasks) as task:
                decode.task(task)
            with ir.Else(), ir.parallel(decode.tasks) as task:
                decode.task(task)
        with ir.serial(decode.tokens * decode.a.p.heads) as row:
            decode.combine(row)
    return f.result()


KERNELS = (Kernel("cpu.paged_attention.split", "paged_attention", _accepts, _build),)
