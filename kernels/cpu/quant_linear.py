# SPDX-License-Identifier: Apache-2.0
"""Quantized linear layers on the CPU, over the `LaneInterleaved` layout: SIMD lanes are 16 output rows.

Decode (`fused`): each word vector is loaded once, a code vector costs AND + convert, and every token row adds one
fused multiply-add. The shift that would right-align a code is folded into the activation instead: the masked field
is code * 2**s, so x is pre-multiplied by 2**-s (exact). Zero points leave the inner loop:
sum x*scale*(code - zero) = scale * (sum x*code - zero * sum x) per group.

Any number of rows (`panel`): a group of weights is dequantized into a float32 panel [codes, 16] that stays in the
cache and is multiplied with up to 96 token rows by a 6x16 register tile (Goto and van de Geijn, 2008, micro-kernel).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from gptq_compile.kernels.layouts import LANES, grouping_of, layout_for
from gptq_compile.kernels.registry import Case, Kernel, Refusal
from gptq_compile.kernels.script import Function, on_stack, script, store, when
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.words import Grouping, block_codes, block_words, fields

FUSED_MAX_ROWS = 8
FUSED_ROWS_AT_ONCE = 4
"""Token rows that share a decoded word: 4 rows x 16 lanes fill 8 of the 16 AVX registers with sums."""
FUSED_CHAINS = 4
"""Independent sums when there is one token row: hides the 4-cycle latency of the fused multiply-add."""
TILE_ROWS = 6
CHUNK_ROWS = 96
PANEL_CODES = 256
FLOATS = ("float32", "float16")

Expr = Any


def _accepts(case: Case, target: Target) -> Refusal | None:
    for what, dtype in (("activations", case.dtype), ("outputs", case.get("out_dtype", case.dtype))):
        if dtype not in FLOATS:
            return Refusal(f"needs float32 or float16 {what}, not {dtype}")
    try:
        grouping_of(case)
    except ValueError as error:
        return Refusal(str(error))
    return None


def _accepts_fused(case: Case, target: Target) -> Refusal | None:
    if case.rows is None or not 1 <= case.rows <= FUSED_MAX_ROWS:
        return Refusal(f"is for 1 to {FUSED_MAX_ROWS} rows known at compile time, not {case.rows or 'symbolic'}")
    return _accepts(case, target)


class Tensors:
    """The parameters of a quant_linear PrimFunc, in the contract's order."""

    def __init__(self, f: Function, case: Case, target: Target) -> None:
        self.case = case
        self.grouping = grouping_of(case)
        self.rows = f.symbol() if case.rows is None else case.rows
        self.x = f.tensor("x", (self.rows, case["in_features"]), case.dtype)
        packed = {
            name: f.tensor(name, shape, dtype)
            for name, (shape, dtype) in layout_for(case, target).tensors(case).items()
        }
        self.words, self.scales, self.zeros = packed["qweight"], packed["scales"], packed.get("zeros")
        self.bias = f.tensor("bias", (case["out_features"],), case.dtype) if case["has_bias"] else None
        self.out_dtype = case.get("out_dtype", case.dtype)
        self.out = f.tensor("out", (self.rows, case["out_features"]), self.out_dtype)
        self.tiles = -(-case["out_features"] // LANES)

    def column_tile(self, tile: Expr, row: Expr) -> Expr:
        """The tile of output columns that a tile of weight rows makes."""
        return tile

    def bias_at(self, row: Expr, column: Expr) -> Expr | None:
        """The bias of an output, or None."""
        return None if self.bias is None else self.bias[column]

    def scale(self, tile: Expr, group: Expr, lane: Expr) -> Expr:
        return script().cast(self.scales[tile, group, lane], "float32")

    def zero(self, tile: Expr, group: Expr, lane: Expr) -> Expr:
        ir = script()
        if self.zeros is None:
            return ir.float32(1 << (self.grouping.bits - 1))
        return ir.cast(ir.cast(self.zeros[tile, group, lane], "int32"), "float32")

    def store_row(self, tile: Expr, row: Expr, value: Callable[[Expr], Expr]) -> None:
        """Emits out[row, tile's lanes] = value(lane) + bias, guarding the lanes of the last tile."""
        ir = script()
        n = self.case["out_features"]
        tile = self.column_tile(tile, row)

        def emit(lane: Expr) -> None:
            column = tile * LANES + lane
            result = value(lane)
            bias = self.bias_at(row, column)
            if bias is not None:
                result = result + ir.cast(bias, "float32")
            store(self.out, (row, column), ir.cast(result, self.out_dtype))

        def whole() -> None:
            with ir.vectorized(LANES) as lane:
                emit(lane)

        if n % LANES == 0:
            whole()
            return
        with when(tile < n // LANES):
            whole()
        with when(tile == n // LANES), ir.serial(n % LANES) as lane:
            emit(lane)


def _code(words: Any, base: tuple[Expr, Expr], lane: Expr, bits: int, j: int, aligned: bool) -> tuple[Expr, int]:
    """Returns code j of the block at (tile, word) as float32, and the exponent s with value = code * 2**s.

    With ``aligned`` False a field below the sign bit stays where it is, which saves the shift.
    """
    ir = script()
    tile, word = base
    parts = fields(bits)[j]
    if len(parts) == 1:
        part = parts[0]
        value = words[tile, word + part.word, lane]
        if part.shift + part.width == 32:
            value, exponent = value >> ir.uint32(part.shift), 0
        elif aligned:
            value, exponent = (value >> ir.uint32(part.shift)) & ir.uint32((1 << part.width) - 1), 0
        else:
            value, exponent = value & ir.uint32(((1 << part.width) - 1) << part.shift), part.shift
    else:
        value, exponent = None, 0
        for part in parts:
            move = part.shift - part.low
            bit = (words[tile, word + part.word, lane] >> ir.uint32(move)) & ir.uint32(1 << part.low)
            value = bit if value is None else value | bit
    return ir.cast(ir.cast(value, "int32"), "float32"), exponent


def _spans(grouping: Grouping) -> list[tuple[int, int, int]]:
    """Returns runs of equal groups as (first group, count, codes per group)."""
    if grouping.last_size == grouping.group_size:
        return [(0, grouping.groups, grouping.group_size)]
    return [(0, grouping.groups - 1, grouping.group_size), (grouping.groups - 1, 1, grouping.last_size)]


def _blocks(bits: int, size: int, emit: Callable[[Expr, Expr, int], None]) -> None:
    """Emits a loop over the whole blocks of a group, then its partial block: emit(word, code, codes in block)."""
    ir = script()
    per_block, per_words = block_codes(bits), block_words(bits)
    whole, rest = divmod(size, per_block)
    if whole:
        with ir.serial(whole) as b:
            emit(b * per_words, b * per_block, per_block)
    if rest:
        emit(whole * per_words, whole * per_block, rest)


def prescaled(t: Tensors) -> tuple[Any, Any]:
    """Emits x * 2**-s (float32 [rows, K]) and the sum of x over each group (float32 [rows, groups])."""
    ir = script()
    grouping, rows = t.grouping, t.rows
    scaled = ir.alloc_buffer((rows, grouping.in_features), "float32")
    sums = ir.alloc_buffer((rows, grouping.groups), "float32")
    exponents = [parts[0].shift if len(parts) == 1 and parts[0].shift + parts[0].width < 32 else 0
                 for parts in fields(grouping.bits)]  # fmt: skip
    with ir.serial(rows) as row:
        for first, count, size in _spans(grouping):
            with ir.serial(count) as g:
                start = (first + g) * grouping.group_size

                def emit(word: Expr, code: Expr, codes: int, start: Expr = start) -> None:
                    for j in range(codes):
                        k = start + code + j
                        value = ir.cast(t.x[row, k], "float32")
                        store(scaled, (row, k), value * ir.float32(2.0 ** -exponents[j]))

                _blocks(grouping.bits, size, emit)
                partial = on_stack(8)
                with ir.vectorized(8) as lane:
                    store(partial, (lane,), ir.float32(0))
                if size >= 8:
                    with ir.serial(size // 8) as c, ir.vectorized(8) as lane:
                        value = ir.cast(t.x[row, start + c * 8 + lane], "float32")
                        store(partial, (lane,), partial[lane] + value)
                for j in range(size % 8):
                    store(partial, (j,), partial[j] + ir.cast(t.x[row, start + size // 8 * 8 + j], "float32"))
                total = partial[0]
                for j in range(1, 8):
                    total = total + partial[j]
                store(sums, (row, first + g), total)
    return scaled, sums


def _fused(case: Case, target: Target) -> Any:
    """Builds the decode kernel: static rows, weights read once per four rows."""
    ir = script()
    with Function("quant_linear") as f:
        t = Tensors(f, case, target)
        grouping = t.grouping
        x, sums = prescaled(t)
        with ir.parallel(t.tiles) as tile:
            passes = -(-case.rows // FUSED_ROWS_AT_ONCE) if case.rows else 1
            first = 0
            for p in range(passes):
                count = -(-(int(case.rows or 1) - first) // (passes - p))
                fused_rows(t, x, sums, tile, tuple(range(first, first + count)), grouping)
                first += count
    return f.result()


def fused_rows(t: Tensors, x: Any, sums: Any, tile: Expr, rows: tuple[Expr, ...], grouping: Grouping) -> None:
    """Emits out[rows, tile] for at most four rows."""
    ir = script()
    chains = max(1, FUSED_CHAINS // len(rows))
    total = [on_stack(LANES) for _ in rows]
    for acc in total:
        _fill(acc)
    for first, count, size in _spans(grouping):
        with ir.serial(count) as i:
            g = first + i
            partial = [[on_stack(LANES) for _ in range(chains)] for _ in rows]
            code = on_stack(LANES)
            for chain in partial:
                for acc in chain:
                    _fill(acc)

            def emit(
                word: Expr, offset: Expr, codes: int, g: Expr = g, partial: Any = partial, code: Any = code
            ) -> None:
                base = (tile, g * grouping.group_words + word)
                for j in range(codes):
                    with ir.vectorized(LANES) as lane:
                        store(code, (lane,), _code(t.words, base, lane, grouping.bits, j, aligned=False)[0])
                    for r, row in enumerate(rows):
                        acc = partial[r][j % chains]
                        with ir.vectorized(LANES) as lane:
                            value = x[row, g * grouping.group_size + offset + j]
                            store(acc, (lane,), acc[lane] + code[lane] * value)

            _blocks(grouping.bits, size, emit)
            for r, row in enumerate(rows):
                with ir.vectorized(LANES) as lane:
                    dot = partial[r][0][lane]
                    for c in range(1, chains):
                        dot = dot + partial[r][c][lane]
                    dot = dot - t.zero(tile, g, lane) * sums[row, g]
                    store(total[r], (lane,), total[r][lane] + t.scale(tile, g, lane) * dot)
    for r, row in enumerate(rows):
        t.store_row(tile, row, total[r].__getitem__)


def _fill(acc: Any) -> None:
    ir = script()
    with ir.vectorized(LANES) as lane:
        store(acc, (lane,), ir.float32(0))


def _panels(grouping: Grouping) -> list[tuple[int, int, int, int]]:
    """Returns runs of equal panels as (first group, panels, groups per panel, codes per group)."""
    runs = []
    for first, count, size in _spans(grouping):
        each = min(count, max(1, PANEL_CODES // size))
        if each:
            runs.append((first, count // each, each, size))
        if each and count % each:
            runs.append((first + count // each * each, 1, count % each, size))
    return runs


def _panel(case: Case, target: Target) -> Any:
    """Builds the general kernel: any number of rows, static or symbolic."""
    ir = script()
    with Function("quant_linear") as f:
        t = Tensors(f, case, target)
        grouping, rows = t.grouping, t.rows
        x = t.x
        if case.dtype != "float32":
            x = ir.alloc_buffer((rows, grouping.in_features), "float32")
            with ir.serial(rows) as row, ir.serial(grouping.in_features) as k:
                store(x, (row, k), ir.cast(t.x[row, k], "float32"))
        runs = _panels(grouping)
        with ir.parallel(t.tiles) as tile:
            panel = ir.alloc_buffer((max(each * size for _, _, each, size in runs), LANES), "float32")
            sums = ir.alloc_buffer((CHUNK_ROWS, LANES), "float32")
            with ir.serial((rows + CHUNK_ROWS - 1) // CHUNK_ROWS) as chunk:
                start = chunk * CHUNK_ROWS
                with ir.serial(CHUNK_ROWS) as r, ir.vectorized(LANES) as lane:
                    store(sums, (r, lane), ir.float32(0))
                for first, count, each, size in runs:
                    with ir.serial(count) as p:
                        group = first + p * each
                        _dequantize(t, panel, tile, group, each, size)
                        with ir.serial(CHUNK_ROWS // TILE_ROWS) as block, when(start + block * TILE_ROWS < rows):
                            _micro(x, rows, panel, sums, start, block * TILE_ROWS, group * grouping.group_size,
                                   each * size)  # fmt: skip
                with ir.serial(CHUNK_ROWS) as r, when(start + r < rows):
                    t.store_row(tile, start + r, functools.partial(_row_lane, sums, r))
    return f.result()


def _row_lane(sums: Any, row: Expr, lane: Expr) -> Expr:
    return sums[row, lane]


def _dequantize(t: Tensors, panel: Any, tile: Expr, group: Expr, groups: int, size: int) -> None:
    """Emits panel[i] = scale * (code - zero) for the codes i of `groups` groups; exact in float32."""
    ir = script()
    bits = t.grouping.bits
    with ir.serial(groups) as i:
        g = group + i
        scale, shift = on_stack(LANES), on_stack(LANES)
        with ir.vectorized(LANES) as lane:
            store(scale, (lane,), t.scale(tile, g, lane))
        with ir.vectorized(LANES) as lane:
            store(shift, (lane,), scale[lane] * t.zero(tile, g, lane))

        def emit(word: Expr, offset: Expr, codes: int) -> None:
            base = (tile, g * t.grouping.group_words + word)
            for j in range(codes):
                with ir.vectorized(LANES) as lane:
                    value, _ = _code(t.words, base, lane, bits, j, aligned=True)
                    store(panel, (i * size + offset + j, lane), value * scale[lane] - shift[lane])

        _blocks(bits, size, emit)


def _micro(x: Any, rows: Expr, panel: Any, sums: Any, start: Expr, row: Expr, k: Expr, codes: int) -> None:
    """Emits sums[row:row+6] += x[start+row:.., k:k+codes] @ panel; rows past the end repeat the last one."""
    ir = script()
    acc = [on_stack(LANES) for _ in range(TILE_ROWS)]
    for r, one in enumerate(acc):
        with ir.vectorized(LANES) as lane:
            store(one, (lane,), sums[row + r, lane])
    with ir.serial(codes) as c:
        for r, one in enumerate(acc):
            with ir.vectorized(LANES) as lane:
                token = ir.min(start + row + r, rows - 1)
                store(one, (lane,), one[lane] + panel[c, lane] * x[token, k + c])
    for r, one in enumerate(acc):
        with ir.vectorized(LANES) as lane:
            store(sums, (row + r, lane), one[lane])


KERNELS = (
    Kernel("cpu.quant_linear.fused", "quant_linear", _accepts_fused, _fused),
    Kernel("cpu.quant_linear.panel", "quant_linear", _accepts, _panel),
)
