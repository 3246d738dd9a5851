# SPDX-License-Identifier: Apache-2.0
"""Attention of any number of tokens on the CPU, in blocks that stay in the cache (FlashAttention, Dao et al. 2022).

A task is a block of tokens and a key head; tokens of a block that share a sequence, and all query heads of the key
head, share one pass over the keys: a chunk of keys and values is brought to float32 once, and multiplied in register
tiles. Tiles that see nothing of a chunk pass it over.
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
from gptq_compile.kernels.registry import Case, Kernel
from gptq_compile.kernels.script import Expr, Function, on_stack, script, store, when
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import tvm

BLOCK_ROWS = 96
"""Rows of a block, a token having one for each query head of the key head."""
BLOCK_TOKENS = 64
TILE_ROWS = 6


class _Prefill:
    """Emits the parts of the kernel.

    Attributes:
        block: tokens of a task. ``rows``: of its tiles.
    """

    def __init__(self, a: Arguments, target: Target) -> None:
        p = a.p
        self.a = a
        self.block = max(1, min(BLOCK_TOKENS, BLOCK_ROWS // p.group))
        self.rows = -(-self.block * p.group // TILE_ROWS) * TILE_ROWS
        most = accumulators(target) // TILE_ROWS
        self.lanes = tm.lanes(a.chunk, 16 if most == 4 else 8)
        self.key_columns = divisor(a.chunk // self.lanes, most)
        self.value_columns = divisor(p.v_head_dim // a.value_lanes, most)

    def scratch(self) -> None:
        """Emits a task's memory: rows of queries and results, a chunk of keys and values in float32."""
        ir, a, p = script(), self.a, self.a.p
        self.queries = ir.alloc_buffer((self.rows, p.head_dim), "float32")
        self.keys = ir.alloc_buffer((p.head_dim, a.chunk), "float32")
        self.values = ir.alloc_buffer((a.chunk, p.v_head_dim), "float32")
        self.scores = ir.alloc_buffer((TILE_ROWS, a.chunk), "float32")
        self.outs = ir.alloc_buffer((self.rows, p.v_head_dim), "float32")
        self.largest = ir.alloc_buffer((self.rows,), "float32")
        self.sums = ir.alloc_buffer((self.rows,), "float32")
        self.where = ir.alloc_buffer((self.rows,), "int32")

    def task(self, number: Expr) -> None:
        """Emits one task."""
        ir, a = script(), self.a
        tokens = ir.cast(a.n, "int32")
        blocks = (tokens + self.block - 1) // self.block
        task = held(number)
        head, turn = held(task // blocks), held(task % blocks)
        # Later blocks see more keys: deal them out from both ends, since threads get contiguous ranges of tasks.
        block = ir.Select(turn % 2 == 0, turn // 2, blocks - 1 - turn // 2)
        start, stop = on_stack(1, "int32"), on_stack(1, "int32")
        store(start, (0,), block * self.block)
        store(stop, (0,), ir.min(tokens, start[0] + self.block))
        self.scratch()
        with ir.While(start[0] < stop[0]):
            # A run of consecutive tokens of one sequence.
            length, lowest, highest = (on_stack(1, "int32") for _ in range(3))
            sequence = held(a.sequences[start[0]])
            store(length, (0,), ir.int32(1))
            store(lowest, (0,), a.first(a.positions[start[0]]))
            store(highest, (0,), a.positions[start[0]])
            last = stop[0] - 1
            with ir.While(
                tvm.tirx.all(
                    start[0] + length[0] < stop[0], a.sequences[ir.min(start[0] + length[0], last)] == sequence
                )
            ):
                position = held(a.positions[start[0] + length[0]])
                store(lowest, (0,), ir.min(lowest[0], a.first(position)))
                store(highest, (0,), ir.max(highest[0], position))
                store(length, (0,), length[0] + 1)
            self._run(start[0], length[0], sequence, head, lowest[0], highest[0])
            store(start, (0,), start[0] + length[0])

    def _run(self, start: Expr, length: Expr, sequence: Expr, head: Expr, lowest: Expr, highest: Expr) -> None:
        ir, a, p = script(), self.a, self.a.p
        tiles = held((length * p.group + TILE_ROWS - 1) // TILE_ROWS)
        # Row r is head r % group of token r // group of the run; those that fill the last tile repeat its last token.
        with ir.serial(tiles * TILE_ROWS) as row:
            token = held(start + ir.min(row // p.group, length - 1))
            store(self.where, (row,), a.positions[token])
            store(self.largest, (row,), ir.float32(NO_MAXIMUM))
            store(self.sums, (row,), ir.float32(0))
            a.load_query(self.queries, row, token, head * p.group + row % p.group)
            with each(p.v_head_dim, a.value_lanes) as at:
                store(self.outs, (row, at), ir.float32(0))
        first = held(lowest // p.page_size)
        pages = held(highest // p.page_size - first + 1)
        with ir.serial((pages + a.chunk_pages - 1) // a.chunk_pages) as chunk:
            page = held(first + chunk * a.chunk_pages)
            self._gather(sequence, head, page, first + pages - 1, lowest, highest)
            with ir.serial(tiles) as tile:
                self._tile(tile * TILE_ROWS, head, page * p.page_size)
        with ir.serial(length * p.group) as row:
            self._finish(row, start + row // p.group, head * p.group + row % p.group)

    def _gather(self, sequence: Expr, head: Expr, page: Expr, last: Expr, lowest: Expr, highest: Expr) -> None:
        """Emits a chunk of keys and values in float32; values that no token of the run sees are zero."""
        ir, a, p = script(), self.a, self.a.p
        with ir.serial(a.chunk_pages) as c:
            physical = held(a.table[sequence, ir.min(page + c, last)])  # keys beyond the last page are masked
            with ir.serial(p.head_dim) as d, each(p.page_size, a.key_lanes) as row:
                value = a.keys.value(physical, head, row, d)
                if a.keys.scaled:
                    value = value * a.keys.scale(physical, head, row)
                store(self.keys, (d, c * p.page_size + row), value)
            with ir.serial(p.page_size) as row:
                position = (page + c) * p.page_size + row
                with ir.If(tvm.tirx.all(lowest <= position, position <= highest)):
                    with ir.Then(), each(p.v_head_dim, a.value_lanes) as at:
                        value = a.values.value(physical, head, row, at)
                        if a.values.scaled:
                            value = value * a.values.scale(physical, head, row)
                        store(self.values, (c * p.page_size + row, at), value)
                    with ir.Else(), each(p.v_head_dim, a.value_lanes) as at:
                        store(self.values, (c * p.page_size + row, at), ir.float32(0))

    def _tile(self, row: Expr, head: Expr, base: Expr) -> None:
        """Emits a tile's pass over the chunk of keys that begins at position ``base``."""
        ir, a, p = script(), self.a, self.a.p
        lowest, highest = on_stack(1, "int32"), on_stack(1, "int32")
        store(lowest, (0,), a.first(self.where[row]))
        store(highest, (0,), self.where[row])
        for r in range(1, TILE_ROWS):
            store(lowest, (0,), ir.min(lowest[0], a.first(self.where[row + r])))
            store(highest, (0,), ir.max(highest[0], self.where[row + r]))
        with when(tvm.tirx.all(base <= highest[0], lowest[0] < base + a.chunk)):
            wide = self.key_columns * self.lanes
            with ir.serial(a.chunk // wide) as column:
                sums = [vectors(self.key_columns, self.lanes) for _ in range(TILE_ROWS)]
                for one in sums:
                    for array in one:
                        fill(array, self.lanes, 0)
                self._multiply(sums, self.queries, row, self.keys, column * wide, ir.int32(p.head_dim), self.lanes)
                for r, one in enumerate(sums):
                    for i, array in enumerate(one):
                        with ir.vectorized(self.lanes) as lane:
                            store(self.scores, (r, column * wide + i * self.lanes + lane), array[lane])
            rescale = on_stack(TILE_ROWS)
            with ir.serial(TILE_ROWS) as r:
                self._softmax(r, row + r, rescale, base, head * p.group + (row + r) % p.group)
            wide = self.value_columns * a.value_lanes
            depth = held(ir.min(highest[0] - base + 1, a.chunk))
            with ir.serial(p.v_head_dim // wide) as column:
                sums = [vectors(self.value_columns, a.value_lanes) for _ in range(TILE_ROWS)]
                for r, one in enumerate(sums):
                    for i, array in enumerate(one):
                        with ir.vectorized(a.value_lanes) as lane:
                            at = column * wide + i * a.value_lanes + lane
                            store(array, (lane,), self.outs[row + r, at] * rescale[r])
                self._multiply(sums, self.scores, ir.int32(0), self.values, column * wide, depth, a.value_lanes)
                for r, one in enumerate(sums):
                    for i, array in enumerate(one):
                        with ir.vectorized(a.value_lanes) as lane:
                            at = column * wide + i * a.value_lanes + lane
                            store(self.outs, (row + r, at), array[lane])

    @staticmethod
    def _multiply(sums: Any, left: Any, row: Expr, right: Any, column: Expr, depth: Expr, lanes: int) -> None:
        """Emits ``sums[r][i] += left[row + r, :depth] @ right[:depth, column + i * lanes:]``."""
        ir = script()
        with ir.serial(depth) as k:
            values = vectors(len(sums[0]), lanes)
            for i, value in enumerate(values):
                with ir.vectorized(lanes) as lane:
                    store(value, (lane,), right[k, column + i * lanes + lane])
            for r, one in enumerate(sums):
                for array, value in zip(one, values, strict=True):
                    with ir.vectorized(lanes) as lane:
                        store(array, (lane,), array[lane] + left[row + r, k] * value[lane])

    def _softmax(self, r: Expr, row: Expr, rescale: Any, base: Expr, head: Expr) -> None:
        """Emits the weights of a row of a tile, and what its sums so far are multiplied by."""
        ir, a, lanes = script(), self.a, self.lanes
        most, total = on_stack(lanes), on_stack(lanes)
        fill(most, lanes, MASKED)
        fill(total, lanes, 0)
        position = held(self.where[row])
        with ir.serial(a.chunk // lanes) as i:
            with ir.vectorized(lanes) as lane:
                at = i * lanes + lane
                store(self.scores, (r, at), a.score(self.scores[r, at], base + at, position, head))
            with ir.vectorized(lanes) as lane:
                store(most, (lane,), ir.max(most[lane], self.scores[r, i * lanes + lane]))
        top = held(ir.max(self.largest[row], fold(most, lanes, ir.max)), "float32")
        store(rescale, (r,), tm.exp(self.largest[row] - top))
        store(self.largest, (row,), top)
        with ir.serial(a.chunk // lanes) as i:
            with ir.vectorized(lanes) as lane:
                store(self.scores, (r, i * lanes + lane), tm.exp(self.scores[r, i * lanes + lane] - top))
            with ir.vectorized(lanes) as lane:
                store(total, (lane,), total[lane] + self.scores[r, i * lanes + lane])
        store(self.sums, (row,), self.sums[row] * rescale[r] + fold(total, lanes, operator.add))

    def _finish(self, row: Expr, token: Expr, head: Expr) -> None:
        """Emits the result of a row: its sums over the sum of its weights."""
        ir, a, p = script(), self.a, self.a.p
        total, factor = on_stack(1), on_stack(1)
        store(total, (0,), self.sums[row])
        store(factor, (0,), ir.float32(1))
        if a.sinks is not None:
            top = held(ir.max(self.largest[row], a.sinks[head]), "float32")
            store(factor, (0,), tm.exp(self.largest[row] - top))
            store(total, (0,), total[0] * factor[0] + tm.exp(a.sinks[head] - top))
        store(factor, (0,), factor[0] / total[0])
        with each(p.v_head_dim, a.value_lanes) as at:
            store(a.out, (token, head, at), ir.cast(self.outs[row, at] * factor[0], a.dtype))


def _build(case: Case, target: Target) -> Any:
    ir = script()
    with Function("paged_attention") as f:
        prefill = _Prefill(Arguments(f, case, target), target)
        blocks = (ir.cast(prefill.a.n, "int32") + prefill.block - 1) // prefill.block
        with ir.parallel(blocks * prefill.a.p.kv_heads) as task:
            prefill.task(task)
    return f.result()


KERNELS = (Kernel("cpu.paged_attention.blocked", "paged_attention", lambda case, target: refuse(case), _build),)
