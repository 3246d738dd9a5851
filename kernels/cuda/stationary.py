# SPDX-License-Identifier: Apache-2.0
"""A kernel over tiles for some rows of activations, which stay in registers while all weights pass by.

Every warp of a block has a stretch of K for its own, the same for all tiles: the fragments of its activations are made
once and never stored. What is read from shared memory again and again by `stream`, four times the bytes of the weights
at 16 rows, is not read here at all. Warps add up a tile through shared memory, one barrier a tile. K longer than the
registers of a block is for `resident`.

Rings of weights, codes as subnormal halves and exact sums are those of `stream`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from gptq_compile.kernels import fragments
from gptq_compile.kernels.cuda import stationary_body, stream, tile_source
from gptq_compile.kernels.cuda.stream import Shape

MAX_ROWS = 16
LONG = 8192
"""Features from which on fewer rows are enough to be faster than `stream`."""
MOST_WARPS = {1: 16, 2: 16, 3: 16, 4: 16, 6: 11, 7: 8, 8: 8}
"""Fragments of 128 k x 8 rows that a warp keeps, 16 registers a lane each -> warps for which the registers suffice."""
SMALL_SLOTS = 16 << 10
"""Bytes of a block's slot below which rings are as deep as they fit: the memory must have enough to do."""
MANY_TILES = 8
"""Tiles of a block from which on warps let each other go ahead by one."""


@dataclass(frozen=True)
class Config:
    """How the kernel divides its work.

    Attributes:
        warps: W, which share K.
        units: U, units of 128 k of each.
        depth: D, slots of a warp's ring.
        early: halves of slots that are requested before the activations, which wait behind them.
        later: a warp waits for the others' part of a tile when it has multiplied the next one, not before.
    """

    warps: int
    units: int
    depth: int
    early: int = 2
    later: bool = False


def rows_of_stream(in_features: int, bits: int) -> int:
    """Returns up to how many rows `stream` is faster, as measured: its integers gain with few bits."""
    if in_features < LONG:
        return 3 if bits == 4 else 4
    return 3 if bits == 3 else 2


def slot_bytes(shape: Shape, config: Config) -> int:
    """Returns the bytes of one ring slot: a warp's weights, scales and zero points of a tile."""
    return stream.slot_bytes(shape, stream.Config(1, 1, 1, 1, config.units))


def blocks(shape: Shape) -> int:
    """Returns how many blocks are launched."""
    return min(stream.BLOCKS, shape.row_tiles // shape.halves)


def shared_bytes(shape: Shape, config: Config) -> int:
    """Returns the shared memory of a block: rings, sums of every warp for two tiles, a barrier."""
    rows = -(-shape.rows // 8) * 8
    partial = 2 * config.warps * 16 * (rows + 2) * 4
    return config.warps * config.depth * slot_bytes(shape, config) + partial + 16


def launch_bytes(shape: Shape, config: Config, archs: tuple[str, ...]) -> int:
    """Returns the shared memory that a launch asks for (see `stream.launch_bytes`)."""
    return max(shared_bytes(shape, config), stream.alone_bytes(archs) if shape.dependent else 0)


def divisions(shape: Shape, archs: tuple[str, ...]) -> Iterator[Config]:
    """Yields the divisions that fit, with as deep rings as fit."""
    limit = min(stream.limits(archs)) - stream.RESERVED
    columns = -(-shape.rows // 8)
    for units in (1, 2, 3, 4, 7, 8):
        warps = -(-shape.units // units)
        if warps > MOST_WARPS.get(units * columns, 0) or (warps < 4 and units > 1):
            continue
        for depth in (6, 5, 4, 3, 2):
            config = Config(warps, units, depth)
            if shared_bytes(shape, config) <= limit:
                yield config
                break


def choose(shape: Shape, archs: tuple[str, ...]) -> Config | None:
    """Returns the division that is taken, or None if nothing fits.

    As few warps, from seven on, as leave none idle: they cost a barrier and sums. Weights of few slots are under way:
    activations wait behind those that are requested before them and share what L2 delivers with those after. Measured
    on an H200 with 2 to 4 bits (benchmarks/RESULTS.md).
    """
    fitting = sorted(
        (config for config in divisions(shape, archs) if config.depth >= 3),
        key=lambda config: (config.warps < 7, config.warps * config.units, config.warps),
    )
    if not fitting:
        return None
    taken = fitting[0] if fitting[0].warps >= 7 else max(fitting, key=lambda config: config.warps)
    many = shape.row_tiles // shape.halves >= MANY_TILES * blocks(shape)
    early, most = (2, 5) if many else (1, 3)
    if many and shape.rows <= 8 and shape.grouping.bits == 4:
        early = 4
    if taken.warps * slot_bytes(shape, taken) >= SMALL_SLOTS:
        taken = dataclasses.replace(taken, depth=min(taken.depth, most))
    return dataclasses.replace(taken, early=early, later=shape.dependent and many)


def source(
    name: str,
    shape: Shape,
    config: Config,
    has_bias: bool,
    out_type: str,
    has_residual: bool = False,
    natural: bool = False,
) -> str:
    """Returns CUDA text with ``name::run(x, q, scales, [zeros], [bias], [residual], out, shared)``."""
    bits, grouping = shape.grouping.bits, shape.grouping
    early = min(config.early, 2 * (config.depth - 1))
    if config.units * bits % 4:
        early += early % 2  # a half is not whole pieces of 512 bytes
    constants = {
        "BITS": bits, "K": grouping.in_features, "N": shape.out_features, "M": shape.rows,
        "GROUP": grouping.group_size, "GROUPS": grouping.groups, "RUN": shape.run, "TILES": shape.row_tiles,
        "CHUNKS": fragments.chunks(grouping.in_features), "UNITS": shape.units,
        "W": config.warps, "U": config.units, "D": config.depth, "BLOCKS": blocks(shape),
        "SLOT": slot_bytes(shape, config), "EARLY": early // 2, "HALF": early % 2,
        "BARRIER_AT": shared_bytes(shape, config) - 16, "SETS": tile_source.sets(bits),
        "ZERO": 1 << (bits - 1), "SECOND": tile_source.SECOND_SET,
        "LOW": 24 - tile_source.exponent(bits, 0), "HIGH": 24 - tile_source.exponent(bits, 1),
    }  # fmt: skip
    text = "\n".join(f"constexpr int {key} = {value};" for key, value in constants.items())
    both = "gate += __half2float(bias[row]); r += __half2float(bias[OUTS + row]);"
    values = {
        **stream.common_values(shape, has_bias, has_residual, out_type),
        "@TAKE@": stationary_body.TAKE_NATURAL if natural else stationary_body.TAKE,
        "@LINES@": str(natural).lower(),
        "@MAKE_BARRIER@": stationary_body.MAKE_BARRIER if config.later else "",
        "@BARRIER_MADE@": "__syncthreads();" if config.later else "",
        "@REACH_BARRIER@": stationary_body.REACH_BARRIER if config.later else "__syncthreads();",
        "@PASS_BARRIER@": stationary_body.PASS_BARRIER if config.later else "",
        "@ADD_BIAS@": "r += __half2float(bias[row]);" if has_bias else "",
        "@ADD_BIAS_PAIR@": both if has_bias else "",
        "@ADD_RESIDUAL_NEXT@": "added_next[n] = residual[(long long)m_out * OUTS + row];" if has_residual else "",
    }
    body = stationary_body.BODY
    for key, value in values.items():
        body = body.replace(key, value)
    head = tile_source.PTX + tile_source.COMMON + tile_source.fragments(bits)
    head += tile_source.LAUNCH if shape.dependent else ""
    head += tile_source.BARRIERS if config.later else ""
    return f"{head}\nnamespace {name} {{\n{text}\n{body}\n}}\n"
