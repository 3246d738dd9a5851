# SPDX-License-Identifier: Apache-2.0
"""The decode kernel over `FragmentTiles`: at most 16 rows of activations, bound by reading the weights once.

A block stays on its multiprocessor and takes tiles of 16 (or 2 x 16) weight rows in turn; S warps split K of a tile
and T tiles are under way side by side. Every lane copies the 16-byte pieces that it will multiply itself into its own
part of a ring in shared memory (cp.async), D - 1 units of 128 k ahead and across tile boundaries, so the memory always
has work and nothing but the end of a tile needs a barrier. Activations are staged once per block.

Per unit a lane reads its words, masks fragments out as subnormal halves (`tile_source`), multiplies on tensor cores
with float32 sums, subtracts zero * sum(x) of the group and multiplies by the scale, both in float32: codes and
activations meet exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gptq_compile.kernels import fragments
from gptq_compile.kernels.cuda import stream_body, stream_digits, stream_halves, stream_input, tile_source
from gptq_compile.kernels.cuda.stream_input import Input
from gptq_compile.kernels.words import Grouping

UNIT = 128
MAX_ROWS = 16
DIGIT_ROWS = 4
"""Rows up to which activations are pairs of 8-bit integers: so many fill the columns of one multiplication."""
BLOCKS = 132
"""Blocks of a launch: one per multiprocessor of an H100 or H200. Fewer run several after another."""
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
RESERVED = 1 << 10
EARLY_BYTES = 32 << 10
"""Weights that a block requests before its activations, which wait behind them: enough for the time until these are
there. The rest of its rings is requested after them."""


@dataclass(frozen=True)
class Config:
    """How a stream kernel divides its work.

    Attributes:
        tiles: T, tiles (of `height` x 16 rows) a block has under way at once.
        splits: S, warps that share a tile's K.
        height: R, 16-row tiles a warp multiplies with the same activations.
        depth: D, slots of a warp's ring.
        units: U, units of 128 k that a warp takes in one turn: more of them cost fewer instructions each.
    """

    tiles: int
    splits: int
    height: int
    depth: int
    units: int = 1


@dataclass(frozen=True)
class Shape:
    """The problem: x [rows, K] times W [N, K] with the groups of `grouping`.

    Attributes:
        made: how x comes about.
        dependent: the kernel is launched while the one before it runs: it asks for weights first, then waits.
        act: if given, the first half of the rows are gates and what is stored is act(gate) times the other half.
    """

    rows: int
    out_features: int
    grouping: Grouping
    has_zeros: bool
    made: Input = stream_input.AS_IT_IS
    dependent: bool = False
    act: str = ""

    @property
    def halves(self) -> int:
        """Tiles that make one tile of results."""
        return 2 if self.act else 1

    @property
    def row_tiles(self) -> int:
        return -(-self.out_features // fragments.TILE_ROWS)

    @property
    def units(self) -> int:
        return -(-self.grouping.in_features // UNIT)

    @property
    def run(self) -> int:
        """Codes after which scales may change: 128, 64 or 32."""
        if self.grouping.groups == 1:
            return UNIT
        return next(size for size in (128, 64, 32) if self.grouping.group_size % size == 0)


def slot_bytes(shape: Shape, config: Config) -> int:
    """Returns the bytes of one ring slot: weights, scales and zero points of a turn."""
    runs = UNIT // shape.run
    return config.height * config.units * (shape.grouping.bits * 256 + runs * (48 if shape.has_zeros else 32))


def staged_units(shape: Shape, config: Config) -> int:
    """Returns the units of activations in shared memory: those of whole turns, zeros at the end."""
    return -(-shape.units // config.units) * config.units


def shared_bytes(shape: Shape, config: Config) -> int:
    """Returns the shared memory of a block: rings, activations, their sums, statistics of rows, partial results."""
    warps = config.tiles * config.splits
    runs = UNIT // shape.run
    columns = _columns(shape)
    units = staged_units(shape, config)
    ring = warps * config.depth * slot_bytes(shape, config)
    digits = uses_digits(shape)
    x = shape.rows * (units * UNIT + (16 if digits else 32)) * 2 + (32 if digits else 0)
    sums = shape.rows * units * runs * (8 if digits else 4)
    partial = 2 * warps * config.height * 16 * columns * 4 if config.splits > 1 else 0
    return ring + x + -(-sums // 16) * 16 + _scratch(shape, config) + partial


def launch_bytes(shape: Shape, config: Config, archs: tuple[str, ...]) -> int:
    """Returns the shared memory that a launch asks for: with overlapping launches at least `alone_bytes`."""
    return max(shared_bytes(shape, config), alone_bytes(archs) if shape.dependent else 0)


def alone_bytes(archs: tuple[str, ...]) -> int:
    """Returns more than half of a multiprocessor's shared memory, so that no two blocks fit.

    Blocks of a dependent launch start wherever there is room. Where two fit, those multiprocessors that are free first
    take two and others none: 43 instead of 20 us for the gate and up linear of Llama-3-8B on an H200.
    """
    most = limits(archs)
    return min(min(most) - RESERVED, max(most) // 2 + RESERVED)


def limits(archs: tuple[str, ...]) -> list[int]:
    """Returns the shared memory that a block may have on each of `archs`."""
    return [SHARED_BYTES.get(int("".join(filter(str.isdigit, arch))), 99 << 10) for arch in archs]


def early_halves(shape: Shape, config: Config) -> int:
    """Returns the halves of turns of weights that a warp requests before the block's activations.

    Where codes are multiplied as integers one turn: none and two were slower for nearly every shape and number of bits;
    a half of long turns of two bits was faster.
    """
    if not shape.dependent:
        return 2 * (config.depth - 1)
    if uses_digits(shape):
        return 1 if _in_long_turns(shape) and config.units == 4 else 2
    early = EARLY_BYTES // (config.tiles * config.splits * slot_bytes(shape, config))
    return 2 * max(1, min(config.depth - 1, early))


def _in_long_turns(shape: Shape) -> bool:
    """Whether turns of four units pay although there are few: one row, two bits, long K, at most two tiles a block."""
    return shape.grouping.bits == 2 and shape.rows == 1 and shape.units >= 64 and shape.row_tiles <= 2 * BLOCKS


def _scratch(shape: Shape, config: Config) -> int:
    """Returns the bytes that the warps of a block need to add up the statistics of a norm."""
    needed = config.tiles * config.splits * shape.rows * 4 if shape.made.kind in stream_input.NORMS else 0
    return -(-needed // 16) * 16


def held(shape: Shape, config: Config) -> int:
    """Returns the pieces of eight activations that a thread stages."""
    side = _side(shape, config)
    return -(-_pieces(shape, config) // (32 * config.tiles * config.splits * side)) * side


def _pieces(shape: Shape, config: Config) -> int:
    return shape.rows * staged_units(shape, config) * 16


def _side(shape: Shape, config: Config) -> int:
    """Returns how many pieces side by side a thread stages: two share a good part of the work on digits."""
    return 2 if uses_digits(shape) and _pieces(shape, config) > 32 * config.tiles * config.splits else 1


def uses_digits(shape: Shape) -> bool:
    """Whether codes are multiplied as integers (`stream_digits`), not as halves (`stream_halves`)."""
    return shape.rows <= DIGIT_ROWS


def _columns(shape: Shape) -> int:
    each = 4 if uses_digits(shape) else 8
    return 1 if shape.rows == 1 else -(-shape.rows // each) * each + 1


def choose(shape: Shape, archs: tuple[str, ...]) -> Config | None:
    """Returns the division of the work for the smallest shared memory of `archs`, or None if nothing fits.

    Measured on an H200 for the shapes of Llama-3-8B and OPT-175B (benchmarks/RESULTS.md, "Quantized linear kernels").
    """
    limit = min(limits(archs)) - RESERVED
    each = -(-shape.row_tiles // BLOCKS)
    tiles, height, units = _for_digits(shape, each) if uses_digits(shape) else _for_halves(shape, each)
    splits = 16 // tiles
    if uses_digits(shape) and shape.units < 64 and (each == 3 or (each == 2 and shape.grouping.bits < 8)):
        splits = 4  # few turns: half of the warps, or a quarter less, were faster
    while splits * units > shape.units:
        splits, units = (splits, units // 2) if units > 1 else (splits // 2, 1)
    while True:
        # A ring is of use across tiles, too.
        turns = -(-shape.units // (splits * units)) * -(-each // (tiles * height))
        most = min(4 if units == 4 and _in_long_turns(shape) else 5, turns + 1)
        for depth in range(most, min(3, turns + 1) - 1, -1):
            config = Config(tiles, splits, height, depth, units)
            if shared_bytes(shape, config) <= limit:
                norm = shape.made.kind in stream_input.NORMS
                if norm and held(shape, config) > stream_input.MOST_HELD[shape.made.kind]:
                    return None
                return config
        if height > 1 and uses_digits(shape) and not shape.act:
            height = 1
        elif units > 1:
            units //= 2
        elif tiles > 1:
            tiles //= 2
        elif splits > 4:
            splits //= 2
        else:
            return None


def _for_digits(shape: Shape, each: int) -> tuple[int, int, int]:
    """Returns (tiles, height, units) for `each` tiles a block where codes are multiplied as integers.

    All tiles of a block at once if they are few. If they are many, so many at once that the last round is full, and
    more units a turn the fewer bits a code has.
    """
    bits = shape.grouping.bits
    if shape.act:
        # A warp multiplies gates and their factors side by side.
        if shape.rows == 1:
            return min(-(-each // 2), 2 if bits >= 4 else 4), 2, {8: 1, 4: 2}.get(bits, 4)
        return min(-(-each // 2), 4), 2, 1 if bits == 8 else 2
    if each <= 3 or shape.units >= 64:
        tiles = min(each, 3 if shape.units < 64 else 2)
        return tiles, 1, 1 if bits == 8 else 4 if (each > 3 and shape.rows == 1) or _in_long_turns(shape) else 2
    if bits == 4 and shape.rows == 1:
        return 4, 2, 2
    tiles = min((4, 6, 7, 8), key=lambda count: -(-each // count) * count)
    return tiles, 1, 1 if bits == 8 else 4 if shape.rows == 1 else 2


def _for_halves(shape: Shape, each: int) -> tuple[int, int, int]:
    """Returns (tiles, height, units) for `each` tiles a block where codes are multiplied as halves.

    Eight warps share the K of a tile, with codes of two and three bits and many tiles four, which then take two tiles
    or two units at once: it is instructions that are short then.
    """
    bits = shape.grouping.bits
    tiles, height, units = min(each, 4), 1, 1
    if bits == 8:
        pass
    elif shape.rows > 8:
        tiles = 2 if each <= 4 else 8
    elif bits == 4 or each <= 4:
        tiles = min(each, 2)
    else:
        height = 2
    if bits < 4 and ((bits == 3 and height == 2) or shape.units >= 64):
        tiles, units = max(tiles, min(each, 2)), 2
    return tiles, height, units


def common_values(shape: Shape, has_bias: bool, has_residual: bool, out_type: str) -> dict[str, str]:
    """Returns what stands between @ signs alike in the texts of kernels over tiles for some rows, and its values."""
    return {
        "@HAS_ZEROS@": str(shape.has_zeros).lower(),
        "@ZEROS@": "const unsigned char* __restrict__ zeros, " if shape.has_zeros else "",
        "@ZEROS_POINTER@": "zeros" if shape.has_zeros else "nullptr",
        "@BIAS@": "const half* __restrict__ bias, " if has_bias else "",
        "@RESIDUAL@": "const float* __restrict__ residual, " if has_residual else "",
        "@GATED@": str(bool(shape.act)).lower(),
        "@ACT@": stream_input.ACTIVATIONS[shape.act] if shape.act else "v",
        "@OUT@": out_type,
        "@LET_NEXT_START@": "gq_let_next_start();" if shape.dependent else "",
        "@WAIT_FOR_PREVIOUS@": "gq_wait_for_previous();" if shape.dependent else "",
        "@FRAGMENTS@": f"gq_fragments{shape.grouping.bits}",
    }


def source(
    name: str,
    shape: Shape,
    config: Config,
    has_bias: bool,
    out_type: str,
    has_residual: bool = False,
    natural: bool = False,
) -> str:
    """Returns CUDA text with ``name::run(x.., q, scales, [zeros], [bias], [residual], out, shared)``.

    The parameters in the place of x are those of ``shape.made``; the residual is float32 [rows, N] and added. Weights
    in `natural` order of k want activations staged in another order.
    """
    bits, grouping = shape.grouping.bits, shape.grouping
    early = early_halves(shape, config)
    constants = {
        "BITS": bits, "K": grouping.in_features, "N": shape.out_features, "M": shape.rows,
        "GROUP": grouping.group_size, "GROUPS": grouping.groups, "RUN": shape.run,
        "TILES": shape.row_tiles, "CHUNKS": fragments.chunks(grouping.in_features), "UNITS": shape.units,
        "STAGED": staged_units(shape, config), "U": config.units,
        "T": config.tiles, "S": config.splits, "R": config.height, "D": config.depth,
        "SLOT": slot_bytes(shape, config), "SIDE": _side(shape, config), "EARLY": early // 2,
        "HALF": early % 2,
        "SETS": tile_source.sets(bits), "COLUMNS": _columns(shape),
        "ZERO": 1 << (bits - 1), "SECOND": tile_source.SECOND_SET,
        "MOST_HELD": stream_input.MOST_HELD[shape.made.kind], "SCRATCH": _scratch(shape, config),
        "LOW": 24 - tile_source.exponent(bits, 0), "HIGH": 24 - tile_source.exponent(bits, 1),
        "BIT_LOW": tile_source.exponent(bits, 0), "BIT_HIGH": tile_source.exponent(bits, 1),
    }  # fmt: skip
    text = "\n".join(f"constexpr int {key} = {value};" for key, value in constants.items())
    parameters = shape.made.parameters
    both = "gate += __half2float(bias[row]); v += __half2float(bias[OUTS + row]);"
    folded = uses_digits(shape) and stream_input.may_fold(shape.made)
    way: Any = stream_digits if uses_digits(shape) else stream_halves
    body = (
        stream_body.BODY.replace("@CONSTANTS@", way.CONSTANTS)
        .replace("@STAGE@", way.STAGE)
        .replace("@BEFORE@", way.BEFORE)
        .replace("@OPERANDS@", way.OPERANDS)
        .replace("@ACCUMULATORS@", way.ACCUMULATORS)
        .replace("@MULTIPLY@", way.MULTIPLY)
        .replace("@TOKEN@", way.TOKEN)
        .replace("@STORE@", way.STORE_NATURAL if natural else way.STORE)
        .replace("@INPUT@", stream_input.source(shape.made, folded))
        .replace("@SCALE_OF@", "row_scale(reinterpret_cast<const float*>(shared + SCRATCH_AT), m)" if folded else "1.f")
        .replace("@FOLDED@", str(folded).lower())
        .replace("@SOURCE@", "".join(f"const {kind}* __restrict__ {key}, " for key, kind in parameters))
        .replace("@ARGUMENTS@", ", ".join(key for key, _ in parameters))
        .replace("@ADD_RESIDUAL@", "v += residual[(long long)m * N + row];" if has_residual else "")
        .replace("@DEPENDENT@", str(shape.dependent).lower())
        .replace("@ADD_BIAS@", "v += __half2float(bias[row]);" if has_bias else "")
        .replace("@ADD_BIAS_PAIR@", both if has_bias else "")
        .replace("@BYTES@", f"gq_bytes{bits}")
    )
    for key, value in common_values(shape, has_bias, has_residual, out_type).items():
        body = body.replace(key, value)
    head = tile_source.PTX + tile_source.COMMON
    head += tile_source.bytes_of(bits) if uses_digits(shape) else tile_source.fragments(bits)
    head += tile_source.LAUNCH if shape.dependent else ""
    return f"{head}\nnamespace {name} {{\n{text}\n{body}\n}}\n"
