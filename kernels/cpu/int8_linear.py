# SPDX-License-Identifier: Apache-2.0
"""Quantized linear layers on the CPU with activations rounded to 8 bits (see `int8_rows`).

Four codes a lane are multiplied by four activations and added up at once (vpdpbusd, on ARM sdot; three instructions
with AVX2). The sum over a piece is an exact integer, and becomes scale_w * scale_x * (sum(x * code) - zero * sum(x)) in
float32.

Few rows, known at compile time, share the codes as they come out of their words. Otherwise a tile of 16 weight rows is
unpacked into bytes, which stay in the cache while blocks of rows are multiplied by them.
"""

from __future__ import annotations

from typing import Any

from gptq_compile.kernels.cpu import byte_codes
from gptq_compile.kernels.cpu.int8_rows import Rounded
from gptq_compile.kernels.cpu.pieces import why_not
from gptq_compile.kernels.cpu.quant_linear import Expr, Tensors
from gptq_compile.kernels.layouts import LANES
from gptq_compile.kernels.registry import Case, Kernel, Refusal
from gptq_compile.kernels.script import Function, on_stack, script, store
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.words import block_codes, block_words

FEW_ROWS = 8
BLOCK_ROWS = {16: 12, 8: 4, 4: 4}
"""Rows that are multiplied at once, by lanes of the target: their sums fill the registers."""
CHUNK_BYTES = 1 << 19
"""Activations that stay in the cache while all tiles pass by."""
CHAINS = 4
"""Independent sums: hide the latency of the dot product."""


def _accepts(case: Case, target: Target) -> Refusal | None:
    if case.get("activations") != "int8":
        return Refusal("rounds activations to 8 bits, which was not asked for")
    return why_not(case) or byte_codes.why_not(target)


def _accepts_few(case: Case, target: Target) -> Refusal | None:
    if case.rows is None or not 1 <= case.rows <= FEW_ROWS:
        return Refusal(f"is for 1 to {FEW_ROWS} rows known at compile time, not {case.rows or 'symbolic'}")
    return _accepts(case, target)


class _Product:
    """Emits products of rounded rows and tiles of 16 weight rows."""

    def __init__(self, t: Tensors, target: Target) -> None:
        self.t, self.target = t, target
        self.bits, self.width = t.grouping.bits, byte_codes.width(target)
        self.x = Rounded(t)
        self.pieces = self.x.pieces
        self.per_block, self.per_words = block_codes(self.bits), block_words(self.bits)
        self.vectors = self.per_block // 4

    def unpacked(self, tile: Expr, word: Expr, shifts: tuple[int, ...]) -> list[list[Expr]]:
        """Byte vectors of the block of codes at a word, for each part of the lanes."""
        found = []
        for part in self._parts():
            words = [self.t.words[tile, word + w, part] for w in range(self.per_words)]
            found.append(byte_codes.byte_vectors(words, self.bits, self.width, shifts))
        return found

    def panel(self) -> Any:
        """Space for the bytes of a tile: uint32 ``[padded / 4, 16]``."""
        return script().alloc_buffer((self.pieces.padded // 4, LANES), "uint32")

    def unpack(self, tile: Expr, panel: Any) -> None:
        """Emits the unpacking of a tile."""
        ir = script()
        blocks = self.t.grouping.row_words // self.per_words
        with ir.serial(blocks) as block:
            unpacked = self.unpacked(tile, block * self.per_words, (0,) * self.vectors)
            for part, vectors in zip(self._parts(), unpacked, strict=True):
                for j, vector in enumerate(vectors):
                    store(panel, (block * self.vectors + j, part), vector)

    def multiply(self, tile: Expr, rows: tuple[Expr, ...], panel: Any | None) -> list[Any]:
        """Emits the products of rows with a tile, unpacked in ``panel`` or else word by word.

        Returns:
            For each row a float32 array of `LANES`.
        """
        ir = script()
        t, pieces, x = self.t, self.pieces, self.x
        totals = [on_stack(LANES) for _ in rows]
        _clear(totals)
        for first, count, sizes in pieces.runs:
            with ir.serial(count) as i:
                group, start = first + i, 0
                scale, zero = on_stack(LANES), on_stack(LANES)
                with ir.vectorized(LANES) as lane:
                    store(scale, (lane,), t.scale(tile, group, lane))
                if t.zeros is not None:
                    with ir.vectorized(LANES) as lane:
                        store(zero, (lane,), t.zero(tile, group, lane))
                partial = totals if len(sizes) == 1 else [on_stack(LANES) for _ in rows]
                if len(sizes) > 1:
                    _clear(partial)
                for number, size in enumerate(sizes):
                    piece = group * pieces.per_group + number
                    sums = self._sums(tile, group, start, size, rows, piece, panel)
                    for r, row in enumerate(rows):
                        with ir.vectorized(LANES) as lane:
                            value = ir.cast(sums[r][lane], "float32")
                            if t.zeros is not None:
                                value = value - zero[lane] * x.sums[row, piece]
                            value = value * (scale[lane] if len(sizes) == 1 else ir.float32(1))
                            store(partial[r], (lane,), partial[r][lane] + value * x.scales[row, piece])
                    start += size
                if len(sizes) > 1:
                    for total, part in zip(totals, partial, strict=True):
                        with ir.vectorized(LANES) as lane:
                            store(total, (lane,), total[lane] + part[lane] * scale[lane])
        return totals

    def _sums(
        self, tile: Expr, group: Expr, start: int, size: int, rows: tuple[Expr, ...], piece: Expr, panel: Any | None
    ) -> list[Any]:
        """Emits the sums over one piece, less the zero point where that is the same for all; int32 ``[LANES]`` each."""
        ir = script()
        t, x, pieces = self.t, self.x, self.pieces
        first_block = group * (pieces.group_span // self.per_block) + start // self.per_block
        blocks = -(-size // self.per_block)
        # A sum for each shift of the codes; more rows share the unpacking and want the registers.
        free = len(rows) == 1 and panel is None
        shifts = byte_codes.free_shifts(self.target, self.bits) if free else (0,) * self.vectors
        kinds = sorted(set(shifts))
        chains = max(1, CHAINS // len(rows) // len(kinds))
        sums = [{shift: [on_stack(LANES, "int32") for _ in range(chains)] for shift in kinds} for _ in rows]
        for row, kept in zip(rows, sums, strict=True):
            for shift in kinds:
                for number, acc in enumerate(kept[shift]):
                    less = ir.int32(0)
                    if t.zeros is None and shift == number == 0:
                        less = x.sums[row, piece] * ir.int32(-(1 << (self.bits - 1)))
                    with ir.vectorized(LANES) as lane:
                        store(acc, (lane,), less)
        # Blocks with fewer vectors than sums come together, so that each sum has one.
        together = max(1, chains * len(kinds) // self.vectors)

        def emit(block: Expr, count: int) -> None:
            turns = dict.fromkeys(kinds, 0)
            for b in range(count):
                at = (first_block + block + b) * self.vectors
                word = (first_block + block + b) * self.per_words
                unpacked = [] if panel is not None else self.unpacked(tile, word, shifts)
                for j, shift in enumerate(shifts):
                    for p, part in enumerate(self._parts()):
                        codes = unpacked[p][j] if panel is None else panel[at + j, part]
                        for r, row in enumerate(rows):
                            acc = sums[r][shift][turns[shift] % chains]
                            values = ir.Broadcast(x.lanes[row, at + j], self.width)
                            store(acc, (part,), byte_codes.dot(self.target, self.bits, acc[part], codes, values))
                    turns[shift] += 1

        if blocks >= together:
            with ir.serial(blocks // together) as i:
                emit(i * together, together)
        if blocks % together:
            emit(ir.int32(blocks // together * together), blocks % together)
        for kept in sums:
            with ir.vectorized(LANES) as lane:
                value = ir.int32(0)
                for shift in kinds:
                    part = kept[shift][0][lane]
                    for other in kept[shift][1:]:
                        part = part + other[lane]
                    value = value + (part >> ir.int32(shift) if shift else part)
                store(kept[0][0], (lane,), value)
        return [kept[0][0] for kept in sums]

    def _parts(self) -> list[Expr]:
        ir = script()
        return [ir.Ramp(ir.int32(at), 1, self.width) for at in range(0, LANES, self.width)]


def _clear(arrays: list[Any]) -> None:
    ir = script()
    for array in arrays:
        with ir.vectorized(LANES) as lane:
            store(array, (lane,), ir.float32(0))


def _build_few(case: Case, target: Target) -> Any:
    ir = script()
    rows = tuple(range(int(case.rows or 1)))
    with Function("quant_linear") as f:
        t = Tensors(f, case, target)
        product = _Product(t, target)
        with ir.serial(len(rows)) as row:
            product.x.round(row)
        with ir.parallel(t.tiles) as tile:
            for row, total in zip(rows, product.multiply(tile, rows, None), strict=True):
                t.store_row(tile, row, total.__getitem__)
    return f.result()


def _build_many(case: Case, target: Target) -> Any:
    ir = script()
    with Function("quant_linear") as f:
        t = Tensors(f, case, target)
        product = _Product(t, target)
        block_rows = BLOCK_ROWS[product.width]
        chunk = max(1, CHUNK_BYTES // (product.pieces.padded * block_rows)) * block_rows
        with ir.parallel(t.rows) as row:
            product.x.round(row)
        with ir.serial((t.rows + chunk - 1) // chunk) as c, ir.parallel(t.tiles) as tile:
            panel = product.panel()
            product.unpack(tile, panel)
            count = ir.min(t.rows - c * chunk, chunk)

            def emit(row: Expr, rows: int) -> None:
                chosen = tuple(c * chunk + row + r for r in range(rows))
                for one, total in zip(chosen, product.multiply(tile, chosen, panel), strict=True):
                    t.store_row(tile, one, total.__getitem__)

            with ir.serial(count // block_rows) as block:
                emit(block * block_rows, block_rows)
            with ir.serial(count % block_rows) as row:
                emit(count // block_rows * block_rows + row, 1)
    return f.result()


KERNELS = (
    Kernel("cpu.quant_linear.int8_few", "quant_linear", _accepts_few, _build_few),
    Kernel("cpu.quant_linear.int8_many", "quant_linear", _accepts, _build_many),
)
