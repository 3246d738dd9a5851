# SPDX-License-Identifier: Apache-2.0
"""Activations rounded to 8 bits for the quantized linears of the CPU: symmetric, one scale for each piece of a row.

Pieces are of at most `MOST` features, see `piece`. Values are stored in the order in which codes come out of their
words (see `byte_codes`).
"""

from __future__ import annotations

import math
import operator
from typing import Any

from gptq_compile.kernels.cpu import byte_codes
from gptq_compile.kernels.cpu.pieces import Pieces
from gptq_compile.kernels.cpu.quant_linear import Expr, Tensors
from gptq_compile.kernels.registry import Case
from gptq_compile.kernels.script import on_stack, script, store
from gptq_compile.kernels.tvm_env import tvm
from gptq_compile.kernels.words import block_codes

MOST = 64
"""Features that share a scale at most: 64 * 127 * 255 < 2**24, so that sums are exact in float32 too."""
_STEP = 32
"""Activations rounded at once: whole blocks of any bits."""
_LANES = 16
_LARGEST_FLOAT = 3.4e38
_LEAST = 1e-36
"""What is all smaller counts as zero: 127 divided by it would not be finite."""


def piece(case: Case) -> int:
    """Features that share a scale. Half as many where a linear has more inputs than outputs: a MLP's last one, whose
    inputs are products, a few of them far larger than the rest. Not in long groups, of which each piece is code."""
    halved = case["in_features"] > case["out_features"] and 0 < case["group_size"] <= 2 * MOST
    return MOST // 2 if halved else MOST


class Rounded:
    """Rows of activations in 8 bits.

    Attributes:
        lanes: int32 ``[rows, padded / 4]``, four values each.
        scales: float32 ``[rows, pieces]``; NaN if an activation is not finite.
        sums: ``[rows, pieces]``, of the values of each: float32 for weights with zero points, else int32.
    """

    def __init__(self, t: Tensors) -> None:
        ir = script()
        self.pieces, self._t = Pieces(t.grouping, piece(t.case)), t
        pieces = self.pieces
        self._values = ir.alloc_buffer((t.rows, pieces.padded), "int8")
        self.lanes = ir.decl_buffer((t.rows, pieces.padded // 4), "int32", data=self._values.data)
        self.scales = ir.alloc_buffer((t.rows, pieces.count), "float32")
        self.sums = ir.alloc_buffer((t.rows, pieces.count), "int32" if t.zeros is None else "float32")

    def round(self, row: Expr) -> None:
        """Emits the rounding of one row."""
        ir = script()
        pieces, grouping = self.pieces, self.pieces.grouping
        for first, count, sizes in pieces.runs:
            with ir.serial(count) as i:
                group, start = first + i, 0
                for number, size in enumerate(sizes):
                    source, to = group * grouping.group_size + start, group * pieces.group_span + start
                    self._round(row, group * pieces.per_group + number, source, to, size)
                    start += size

    def _round(self, row: Expr, piece: Expr, source: Expr, to: Expr, size: int) -> None:
        """Emits one piece: its largest magnitude, its scale, its values in order, and their sum."""
        ir = script()
        x = self._t.x
        largest, plain, factor = on_stack(_LANES), on_stack(_LANES), on_stack(2)
        with ir.vectorized(_LANES) as lane:
            store(largest, (lane,), ir.float32(0))
        with ir.vectorized(_LANES) as lane:
            store(plain, (lane,), ir.float32(0))

        def look(start: Expr, lanes: int) -> None:
            with ir.vectorized(lanes) as lane:
                store(largest, (lane,), ir.max(largest[lane], ir.fabs(x[row, source + start + lane])))
            with ir.vectorized(lanes) as lane:
                store(plain, (lane,), plain[lane] + x[row, source + start + lane])

        if size >= _LANES:
            with ir.serial(size // _LANES) as i:
                look(i * _LANES, _LANES)
        if size % _LANES:
            look(size // _LANES * _LANES, size % _LANES)
        store(factor, (0,), _folded(largest, _LANES, ir.max))
        store(factor, (1,), _folded(plain, _LANES, operator.add))
        finite = ir.fabs(factor[1]) <= ir.float32(_LARGEST_FLOAT)  # which is false for NaN
        scale = ir.Select(finite, factor[0] * ir.float32(1 / byte_codes.LARGEST), ir.float32(math.nan))
        store(self.scales, (row, piece), scale)
        inverse = ir.Select(factor[0] > ir.float32(_LEAST), ir.float32(byte_codes.LARGEST) / factor[0], ir.float32(0))
        store(factor, (0,), inverse)
        self._put(row, piece, source, to, size, factor)

    def _put(self, row: Expr, piece: Expr, source: Expr, to: Expr, size: int, factor: Any) -> None:
        ir, x, bits = script(), self._t.x, self.pieces.grouping.bits
        total = on_stack(_STEP, "int32")
        with ir.vectorized(_STEP) as lane:
            store(total, (lane,), ir.int32(0))
        per_block = block_codes(bits)
        places = [block + code for block in range(0, _STEP, per_block) for code in byte_codes.order(bits)]
        ramp = ir.Ramp(ir.int32(0), 1, _STEP)

        def put(start: Expr, values: Expr) -> None:
            store(total, (ramp,), total[ramp] + values)
            shuffled = tvm.tirx.Shuffle([ir.cast(values, f"int8x{_STEP}")], places)
            store(self._values, (row, ir.Ramp(to + start, 1, _STEP)), shuffled)

        if size >= _STEP:
            with ir.serial(size // _STEP) as i:
                loaded = x[row, ir.Ramp(source + i * _STEP, 1, _STEP)]
                put(i * _STEP, ir.cast(ir.nearbyint(loaded * ir.Broadcast(factor[0], _STEP)), f"int32x{_STEP}"))
        rest = size % _STEP
        if rest:
            start = size // _STEP * _STEP
            short = on_stack(_STEP, "int32")
            with ir.vectorized(_STEP) as lane:
                store(short, (lane,), ir.int32(0))
            with ir.serial(rest) as k:
                store(short, (k,), ir.cast(ir.nearbyint(x[row, source + start + k] * factor[0]), "int32"))
            with ir.vectorized(_STEP) as lane:
                store(total, (lane,), total[lane] + short[lane])
            for j in range(-(-rest // per_block) * per_block):
                store(self._values, (row, to + start + j), ir.cast(short[places[j]], "int8"))
        store(self.sums, (row, piece), ir.cast(_folded(total, _STEP, operator.add), self.sums.dtype))


def _folded(vector: Any, lanes: int, join: Any) -> Expr:
    """All lanes joined to one; by shuffles, because narrower loads would pin the vector to memory."""
    tir = tvm.tirx
    value = tir.BufferLoad(vector, [tir.Ramp(0, 1, lanes)])
    while lanes > 1:
        lanes //= 2
        value = join(tir.Shuffle([value], list(range(lanes))), tir.Shuffle([value], list(range(lanes, 2 * lanes))))
    return value
