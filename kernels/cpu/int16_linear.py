# SPDX-License-Identifier: Apache-2.0
"""Quantized linear layers on the CPU for a few tokens, in integers: bound by reading the weights.

Activations are rounded to 16 bits, with one scale for each group of input features (at most `PIECE` of them): NMSE of
the result about 1e-9. What that buys: two neighbouring codes lie in a word as a pair of 16-bit numbers already (see
`words`), so that a shift and an AND decode two codes a lane, and one multiply-add (pmaddwd) multiplies both by their
activations. In float32 that is two ANDs, two conversions and two multiply-adds.

The sum of x * (code - zero) over a piece is an exact 32-bit integer: sum(x * code) - zero * sum(x), both below 2**31.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from gptq_compile.kernels.cpu.pieces import Pieces, why_not
from gptq_compile.kernels.cpu.quant_linear import FUSED_MAX_ROWS, FUSED_ROWS_AT_ONCE, Expr, Tensors
from gptq_compile.kernels.layouts import LANES
from gptq_compile.kernels.registry import Case, Kernel, Refusal
from gptq_compile.kernels.script import Function, on_stack, script, store
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.words import block_codes, block_words

PIECE = 256
"""Features that share one activation scale at most: 256 * 255 * 32767 < 2**31."""
WIDTH = 8
"""32-bit lanes of one operation."""
_TOP = 32767.0
_LARGEST = 3.4e38
_LEAST = 1e-30
"""What is all smaller counts as zero: 32767 divided by it would not be finite."""


def _accepts(case: Case, target: Target) -> Refusal | None:
    if case.rows is None or not 1 <= case.rows <= FUSED_MAX_ROWS:
        return Refusal(f"is for 1 to {FUSED_MAX_ROWS} rows known at compile time, not {case.rows or 'symbolic'}")
    if not target.has("avx2"):
        return Refusal("is for x86-64 processors with AVX2")
    return why_not(case)


class Rounded:
    """Activations in 16 bits.

    Attributes:
        values: int16 ``[rows, padded]``. ``pairs``: the same as int32 ``[rows, padded / 2]``.
        scales: float32 ``[rows, pieces]``; NaN if an activation is not finite.
        sums: int32 ``[rows, pieces]``, of the values of each.
    """

    def __init__(self, t: Tensors, pieces: Pieces) -> None:
        ir = script()
        self.pieces = pieces
        self.values = ir.alloc_buffer((t.rows, pieces.padded), "int16")
        self.pairs = ir.decl_buffer((t.rows, pieces.padded // 2), "int32", data=self.values.data)
        self.scales = ir.alloc_buffer((t.rows, pieces.count), "float32")
        self.sums = ir.alloc_buffer((t.rows, pieces.count), "int32")
        with ir.serial(t.rows) as row:
            for first, count, sizes in pieces.runs:
                with ir.serial(count) as i:
                    start = 0
                    for number, size in enumerate(sizes):
                        group = first + i
                        piece = group * pieces.per_group + number
                        source = group * pieces.grouping.group_size + start
                        self._round(t.x, row, piece, source, group * pieces.group_span + start, size)
                        start += size
                    for k in range(start, _up(start, block_codes(pieces.grouping.bits))):
                        store(self.values, (row, (first + i) * pieces.group_span + k), ir.int16(0))

    def _round(self, x: Any, row: Expr, piece: Expr, source: Expr, to: Expr, size: int) -> None:
        """Emits one piece: its largest magnitude, its scale, its rounded values and their sum."""
        ir = script()
        largest, plain, total = on_stack(WIDTH), on_stack(WIDTH), on_stack(WIDTH, "int32")
        for array, zero in ((largest, ir.float32(0)), (plain, ir.float32(0)), (total, ir.int32(0))):
            with ir.vectorized(WIDTH) as lane:
                store(array, (lane,), zero)

        def widen(offset: Expr, lane: Expr) -> None:
            value = x[row, source + offset + lane]
            store(largest, (lane,), ir.max(largest[lane], ir.fabs(value)))
            store(plain, (lane,), plain[lane] + value)

        _by_lanes(size, widen)
        top, everything = largest[0], plain[0]
        for lane in range(1, WIDTH):
            top, everything = ir.max(top, largest[lane]), everything + plain[lane]
        factor = on_stack(2)
        store(factor, (0,), top)
        store(factor, (1,), ir.Select(factor[0] > ir.float32(_LEAST), ir.float32(_TOP) / factor[0], ir.float32(0)))
        finite = ir.fabs(everything) <= ir.float32(_LARGEST)  # which is false for NaN
        scale = ir.Select(finite, factor[0] * ir.float32(1 / _TOP), ir.float32(math.nan))
        store(self.scales, (row, piece), scale)

        def put(offset: Expr, lane: Expr) -> None:
            value = ir.cast(ir.nearbyint(x[row, source + offset + lane] * factor[1]), "int32")
            store(self.values, (row, to + offset + lane), ir.cast(value, "int16"))
            store(total, (lane,), total[lane] + value)

        _by_lanes(size, put)
        whole = total[0]
        for lane in range(1, WIDTH):
            whole = whole + total[lane]
        store(self.sums, (row, piece), whole)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _by_lanes(size: int, emit: Callable[[Expr, Expr], None]) -> None:
    """Emits ``emit(offset, lane)`` for all of ``size`` elements, `WIDTH` at a time."""
    ir = script()
    if size >= WIDTH:
        with ir.serial(size // WIDTH) as i, ir.vectorized(WIDTH) as lane:
            emit(i * WIDTH, lane)
    for lane in range(size % WIDTH):
        emit(size // WIDTH * WIDTH, lane)


def _build(case: Case, target: Target) -> Any:
    ir = script()
    with Function("quant_linear") as f:
        t = Tensors(f, case, target)
        x = Rounded(t, Pieces(t.grouping, PIECE))
        rows = int(case.rows or 1)
        passes = -(-rows // FUSED_ROWS_AT_ONCE)
        with ir.parallel(t.tiles) as tile:
            first = 0
            for p in range(passes):
                count = -(-(rows - first) // (passes - p))
                _tile(t, x, tile, tuple(range(first, first + count)))
                first += count
    return f.result()


def _tile(t: Tensors, x: Rounded, tile: Expr, rows: tuple[int, ...]) -> None:
    """Emits out[rows, tile] for at most `FUSED_ROWS_AT_ONCE` rows."""
    ir = script()
    grouping, pieces = t.grouping, x.pieces
    total = [on_stack(LANES) for _ in rows]
    for acc in total:
        with ir.vectorized(LANES) as lane:
            store(acc, (lane,), ir.float32(0))
    for first, count, sizes in pieces.runs:
        with ir.serial(count) as i:
            group = first + i
            partial = [on_stack(LANES) for _ in rows]
            start = 0
            for number, size in enumerate(sizes):
                piece = group * pieces.per_group + number
                sums = _products(t, x, tile, rows, group, start, size)
                for r, row in enumerate(rows):
                    with ir.vectorized(LANES) as lane:
                        zero = ir.cast(t.zeros[tile, group, lane], "int32") if t.zeros is not None else None
                        middle = ir.int32(1 << (grouping.bits - 1)) if zero is None else zero
                        whole = sums[r][lane] - middle * x.sums[row, piece]
                        value = ir.cast(whole, "float32") * x.scales[row, piece]
                        store(partial[r], (lane,), value if number == 0 else partial[r][lane] + value)
                start += size
            for r in range(len(rows)):
                with ir.vectorized(LANES) as lane:
                    store(total[r], (lane,), total[r][lane] + t.scale(tile, group, lane) * partial[r][lane])
    for r, row in enumerate(rows):
        t.store_row(tile, row, total[r].__getitem__)


def _products(t: Tensors, x: Rounded, tile: Expr, rows: tuple[int, ...], group: Expr, start: int, size: int) -> list:
    """Emits sum(x * code) over one piece; returns an int32 array of `LANES` for each row."""
    ir = script()
    bits, grouping = t.grouping.bits, t.grouping
    chains = 2 if len(rows) == 1 else 1
    sums = [[on_stack(LANES, "int32") for _ in range(chains)] for _ in rows]
    for chain in sums:
        for acc in chain:
            with ir.vectorized(LANES) as lane:
                store(acc, (lane,), ir.int32(0))
    per_block, per_words = block_codes(bits), block_words(bits)
    first_word = group * grouping.group_words + start // per_block * per_words
    first_pair = (group * x.pieces.group_span + start) // 2
    with ir.serial(_up(size, per_block) // per_block) as block:
        word, pair = first_word + block * per_words, first_pair + block * (per_block // 2)
        for half in range(LANES // WIDTH):
            lanes = ir.Ramp(ir.int32(half * WIDTH), 1, WIDTH)
            loaded = [t.words[tile, word + w, lanes] for w in range(per_words)]
            for j, codes in enumerate(_pairs(loaded, bits)):
                for r, row in enumerate(rows):
                    acc = sums[r][j % chains]
                    both = ir.Broadcast(x.pairs[row, pair + j], WIDTH)
                    store(acc, (lanes,), acc[lanes] + _multiply_add(codes, both))
    if chains > 1:
        for chain in sums:
            with ir.vectorized(LANES) as lane:
                value = chain[0][lane]
                for other in chain[1:]:
                    value = value + other[lane]
                store(chain[0], (lane,), value)
    return [chain[0] for chain in sums]


def _pairs(words: list[Expr], bits: int) -> list[Expr]:
    """The codes of a block as pairs (2j, 2j + 1) in the halves of 32-bit lanes, in order."""

    def picked(word: Expr, shift: int, width: int, low: int = 0) -> Expr:
        ir = script()
        mask = ((1 << width) - 1) << low
        move = shift - low
        moved = word if move == 0 else word >> ir.Broadcast(ir.uint32(move), WIDTH)
        return moved & ir.Broadcast(ir.uint32(mask | mask << 16), WIDTH)

    per_word = 16 // bits
    found = [picked(word, bits * i, bits) for word in words for i in range(per_word)]
    if bits == 3:  # the last pair: one bit of it in each word
        parts = [picked(word, 15, 1, w) for w, word in enumerate(words)]
        found.append(parts[0] | parts[1] | parts[2])
    return found


def _multiply_add(codes: Expr, values: Expr) -> Expr:
    """For each 32-bit lane: low half times low half plus high half times high half, signed."""
    ir = script()
    halves = f"int16x{2 * WIDTH}"
    return ir.call_llvm_pure_intrin(
        f"int32x{WIDTH}", "llvm.x86.avx2.pmadd.wd", ir.reinterpret(halves, codes), ir.reinterpret(halves, values)
    )


KERNELS = (Kernel("cpu.quant_linear.int16", "quant_linear", _accepts, _build),)
