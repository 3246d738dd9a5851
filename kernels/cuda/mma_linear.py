# SPDX-License-Identifier: Apache-2.0
"""Tensor-core linear layers with weights as the 16-row operand: one generator for packed and half weights.

mma.m16n8k16 multiplies 16 weight rows with 8 tokens. Because the order of the summed index k is free as long as both
operands agree, lane (g, c) = (lane / 4, lane % 4) reads *contiguous* codes of rows g and g + 8 (up to 16 bytes at
once) and feeds four of them to each mma: fragment slots k = 2c, 2c+1, 2c+8, 2c+9 stand for its codes 4t .. 4t+3.
Per step a warp covers 4 * C consecutive k, lane c the codes [c * C, (c + 1) * C).

* `decode`: at most 8 tokens. A block owns 16 weight rows and its warps split K; sums meet in shared memory. Up to 8
  tokens cost what one does, since the token side of the mma is 8 wide anyway.
* `tiles`: any number of tokens. A block of four warps owns 64 or 128 weight rows x 64 tokens; 128 k of activations
  are staged in shared memory in fragment order (row stride = 8 mod 32 words, so half-warps hit all banks).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gptq_compile.kernels.cuda.warp import (
    address,
    barrier,
    dequantize,
    load_halves,
    load_words,
    mma,
    private_address,
)
from gptq_compile.kernels.script import local, script, store, when

Expr = Any

ROWS = 16
TOKENS = 8
TILE_TOKENS = 64
TILE_WARPS = 4
TILE_CODES = 128
MAX_WARPS = 8


@dataclass(frozen=True)
class Weights:
    """Where a kernel's weights come from.

    Attributes:
        words: buffer u32 [N, row_words], or float16 [N, K] when `bits` is 16.
        bits: 2, 3, 4, 8 (packed) or 16 (half).
        group_size, groups: scale groups along K (one group for half weights).
        scales, zeros: buffers [N, groups], or None.
        out_features, in_features: N, K.
    """

    words: Any
    bits: int
    out_features: int
    in_features: int
    group_size: int = 0
    groups: int = 1
    scales: Any = None
    zeros: Any = None

    @property
    def unit_codes(self) -> int:
        """Codes dequantized together; all in one group."""
        return UNIT_CODES[self.bits]

    @property
    def unit_words(self) -> int:
        """Words of a unit."""
        return self.unit_codes * self.bits // 32

    @property
    def row_words(self) -> int:
        """Words of a row with its padding, a multiple of four."""
        if self.bits == 16:
            return self.in_features // 2
        return int(self.words.shape[1])

    def load(self, registers: Any, at: int, row: Expr, unit: Expr, units: int) -> None:
        """Emits the load of `units` units of a row from `unit` on into registers[at:]; reads stay in the row."""
        count = units * self.unit_words
        width = 4 if count % 4 == 0 else 2 if count % 2 == 0 else 1
        ir = script()
        for i in range(0, count, width):
            word = ir.min(unit * self.unit_words + i, self.row_words - width)
            source = address(self.words, row, word * 2 if self.bits == 16 else word)
            load_words(width, private_address(registers, at + i), source)

    def pairs(self, target: Any, registers: Any, at: int, row: Expr, unit: Expr, grid: Any) -> list[Expr]:
        """Emits the dequantization of one unit; returns its half pairs (u32) in code order."""
        if self.bits == 16:
            return [registers[at + i] for i in range(self.unit_codes // 2)]
        dequantize(self.bits, self.unit_words, private_address(target), private_address(registers, at), *grid)
        return [target[i] for i in range(self.unit_codes // 2)]

    def grid(self, row: Expr, unit: Expr) -> tuple[Expr, Expr]:
        """Returns scale (float16) and zero point (int32) of a unit."""
        ir = script()
        group = ir.min(unit * self.unit_codes // self.group_size, self.groups - 1)
        zero = ir.int32(1 << (self.bits - 1))
        if self.zeros is not None:
            zero = ir.cast(self.zeros[row, group], "int32")
        return self.scales[row, group], zero


UNIT_CODES = {2: 16, 3: 32, 4: 8, 8: 8, 16: 8}


def why_not(bits: int, in_features: int, group_size: int, groups: int, dtype: str) -> str | None:
    """Returns why the tensor-core kernels do not fit, or None."""
    if dtype != "float16":
        return f"needs float16 activations, not {dtype}"
    unit = UNIT_CODES[bits]
    if groups > 1 and group_size % unit:
        return f"needs groups of whole units of {unit} codes, not {group_size}"
    if bits == 16 and in_features % 8:
        return f"needs in_features to be a multiple of 8, not {in_features}"
    return None


@dataclass(frozen=True)
class Problem:
    """The tensors around the weights: x [m, K], bias [N] or None, out [m, N]; m is `rows`."""

    x: Any
    bias: Any
    out: Any
    rows: Expr
    out_dtype: str


def _store(p: Problem, w: Weights, token: Expr, row: Expr, value: Expr) -> None:
    """Emits out[token, row] = value + bias where both exist."""
    ir = script()
    with when(ir.And(token < p.rows, row < w.out_features)):
        if p.bias is not None:
            value = value + ir.cast(p.bias[row], "float32")
        store(p.out, (token, row), ir.cast(value, p.out_dtype))


def _multiply(
    w: Weights,
    sums: list[list[Any]],
    words: list[list[Any]],
    rows: list[list[Expr]],
    unit: Expr,
    units: int,
    tokens: Any,
) -> None:
    """Emits the mma steps of `units` units.

    Args:
        w: the weights.
        sums: [row fragment][token fragment] four float32 registers each.
        words: [row fragment][half] loaded words.
        rows: [row fragment][half] weight rows.
        unit: the first unit of this lane.
        units: how many.
        tokens: ``tokens(unit index, quad)`` emits loads and returns the (b0, b1) of each token fragment.
    """
    once = w.bits == 16 or w.groups == 1 or w.group_size % (units * w.unit_codes) == 0
    registers = [[local(w.unit_codes // 2, "uint32") for _ in half] for half in rows]
    grids: list[list[Any]] = [[None, None] for _ in rows]
    if w.bits != 16 and once:
        grids = [[_held(w.grid(row, unit)) for row in half] for half in rows]
    for i in range(units):
        pairs: list[list[list[Expr]]] = []
        for f, half in enumerate(rows):
            pairs.append([])
            for h, row in enumerate(half):
                grid = grids[f][h] if once or w.bits == 16 else w.grid(row, unit + i)
                pairs[f].append(w.pairs(registers[f][h], words[f][h], i * w.unit_words, row, unit + i, grid))
        for quad in range(w.unit_codes // 4):
            fragments = tokens(i, quad)
            for f, (low, high) in enumerate(pairs):
                a = (low[2 * quad], high[2 * quad], low[2 * quad + 1], high[2 * quad + 1])
                for t, b in enumerate(fragments):
                    mma(private_address(sums[f][t]), a, b)


def _held(grid: tuple[Expr, Expr]) -> tuple[Expr, Expr]:
    """Emits scale and zero point into registers."""
    scale, zero = local(1, "float16"), local(1, "int32")
    store(scale, (0,), grid[0])
    store(zero, (0,), grid[1])
    return scale[0], zero[0]


def _zeroed(count: int) -> list[Any]:
    sums = [local(4) for _ in range(count)]
    for one in sums:
        for i in range(4):
            store(one, (i,), script().float32(0))
    return sums


def decode_units(w: Weights) -> int:
    """Returns the units a lane takes per step: 16 to 64 bytes of a row, fewer when K is short."""
    if w.bits == 3:
        return 4 if w.in_features >= 2048 else 1
    return {2: 4, 4: 4, 8: 4, 16: 4}[w.bits]


def decode(w: Weights, p: Problem) -> None:
    """Emits the kernel for at most 8 tokens."""
    ir = script()
    units = decode_units(w)
    steps = -(-w.in_features // (4 * units * w.unit_codes))
    # As many warps as possible without idle ones in the last round.
    low = min(steps, MAX_WARPS // 2)
    warps = min(range(min(steps, MAX_WARPS), low - 1, -1), key=lambda n: -(-steps // n) * n)
    rounds = -(-steps // warps)
    ahead = 2 if rounds > 1 and units * w.unit_words <= 8 else 1
    with (
        ir.launch_thread("blockIdx.x", -(-w.out_features // ROWS)) as block,
        ir.launch_thread("threadIdx.x", 32 * warps) as thread,
    ):
        warp, g, c = thread // 32, thread % 32 // 4, thread % 4
        rows = [[ir.min(block * ROWS + g + 8 * h, w.out_features - 1) for h in range(2)]]
        partial = ir.alloc_buffer((warps, ROWS * TOKENS), "float32", scope="shared")
        sums = [_zeroed(1)]
        words = [[[local(units * w.unit_words, "uint32") for _ in range(2)]] for _ in range(ahead)]
        half = local(4, "uint32")
        with ir.serial(-(-rounds // ahead)) as r:
            first = [(((r * ahead + a) * warps + warp) * 4 + c) * units for a in range(ahead)]
            for a in range(ahead):
                for h in range(2):
                    w.load(words[a][0][h], 0, rows[0][h], first[a], units)
            for a in range(ahead):

                def tokens(i: int, quad: int, a: int = a) -> list[tuple[Expr, Expr]]:
                    if quad % 2 == 0:
                        k = (first[a] + i) * w.unit_codes + 4 * quad
                        count = ir.if_then_else(g < p.rows, w.in_features - k, 0)
                        source = address(p.x, ir.min(g, p.rows - 1), ir.min(k, w.in_features - 1))
                        load_halves(private_address(half), source, count, w.in_features % 8 == 0)
                    return [(half[2 * (quad % 2)], half[2 * (quad % 2) + 1])]

                _multiply(w, sums, words[a], rows, first[a], units, tokens)
        for i in range(4):
            store(partial, (warp, (2 * c + i % 2) * ROWS + g + 8 * (i // 2)), sums[0][0][i])
        barrier()
        for start in range(0, ROWS * TOKENS, 32 * warps):
            index = thread + start
            with when(index < ROWS * TOKENS):
                total = partial[0, index]
                for other in range(1, warps):
                    total = total + partial[other, index]
                _store(p, w, index // ROWS, block * ROWS + index % ROWS, total)


def tiles(w: Weights, p: Problem) -> None:
    """Emits the kernel for any number of tokens."""
    ir = script()
    units = TILE_CODES // 4 // w.unit_codes
    per_warp = 2 if w.out_features >= 2048 else 1
    owned = TILE_WARPS * per_warp * ROWS
    fragments = TILE_TOKENS // TOKENS
    stride = TILE_CODES // 2 + 8
    token_blocks = ir.cast((p.rows + TILE_TOKENS - 1) // TILE_TOKENS, "int32")
    with (
        ir.launch_thread("blockIdx.x", -(-w.out_features // owned)) as block,
        ir.launch_thread("blockIdx.y", token_blocks) as token_block,
        ir.launch_thread("threadIdx.x", 32 * TILE_WARPS) as thread,
    ):
        warp, g, c = thread // 32, thread % 32 // 4, thread % 4
        first_row = block * owned + warp * per_warp * ROWS
        rows = [
            [ir.min(first_row + f * ROWS + g + 8 * h, w.out_features - 1) for h in range(2)] for f in range(per_warp)
        ]
        # Flat, because TVM would shrink rows of a matrix to the words in use and so undo the padding against conflicts.
        staged = ir.alloc_buffer((TILE_TOKENS * stride,), "uint32", scope="shared")
        sums = [_zeroed(fragments) for _ in range(per_warp)]
        words = [[local(units * w.unit_words, "uint32") for _ in range(2)] for _ in range(per_warp)]
        half = local(4, "uint32")
        with ir.serial(-(-w.in_features // TILE_CODES)) as step:
            unit = (step * 4 + c) * units
            for f in range(per_warp):
                for h in range(2):
                    w.load(words[f][h], 0, rows[f][h], unit, units)
            barrier()
            for i in range(TILE_TOKENS * TILE_CODES // 8 // (32 * TILE_WARPS)):
                chunk = thread + i * 32 * TILE_WARPS
                line, column = chunk // (TILE_CODES // 8), chunk % (TILE_CODES // 8)
                token, k = token_block * TILE_TOKENS + line, step * TILE_CODES + column * 8
                count = ir.if_then_else(token < p.rows, w.in_features - k, 0)
                source = address(p.x, ir.min(token, p.rows - 1), ir.min(k, w.in_features - 1))
                load_halves(private_address(half), source, count, w.in_features % 8 == 0)
                for j in range(4):
                    quad = column % 4 * 2 + j // 2
                    store(staged, (line * stride + (quad * 4 + column // 4) * 2 + j % 2,), half[j])
            barrier()

            def tokens(i: int, quad: int) -> list[tuple[Expr, Expr]]:
                at = ((i * w.unit_codes // 4 + quad) * 4 + c) * 2
                lines = [(t * TOKENS + g) * stride + at for t in range(fragments)]
                return [(staged[line], staged[line + 1]) for line in lines]

            _multiply(w, sums, words, rows, unit, units, tokens)
        for f in range(per_warp):
            for t in range(fragments):
                for i in range(4):
                    token = token_block * TILE_TOKENS + t * TOKENS + 2 * c + i % 2
                    _store(p, w, token, first_row + f * ROWS + g + 8 * (i // 2), sums[f][t][i])
