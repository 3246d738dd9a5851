# SPDX-License-Identifier: Apache-2.0
"""A kernel over tiles for some rows of long activations: the blocks of a cluster share K.

Each block holds its stretch of the activations in shared memory and multiplies it by the same stretch of the cluster's
tiles, which its warps divide among themselves: some tiles each, and every S-th unit of 128 k. Where `stationary` ends
each tile with a barrier and sums over all warps, nothing is waited for here until all tiles are multiplied. Then the
warps of a tile add up what they have and send it (st.async) to the block that is to store it, whose mbarrier counts
bytes: no barrier of the cluster, which would wait for all that is under way.

Codes as subnormal halves and exact sums are those of `stream`. From sm_90 on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gptq_compile.kernels import fragments
from gptq_compile.kernels.cuda import resident_body, stream, tile_source
from gptq_compile.kernels.cuda.stream import UNIT, Shape

AT_ONCE = {8: 15}
"""Blocks of a cluster -> clusters that an H200 runs at once, one block a multiprocessor (as CUDA reports them)."""
MOST_WARPS = {3: 12, 2: 16, 1: 16}
"""Tiles that a warp multiplies side by side -> warps of a block for which the registers suffice."""
FEWEST_WARPS = 8
"""Warps of a block below which they wait more than they work."""
SCHEDULERS = 4
"""Of a multiprocessor: warps beyond a multiple of it take another turn."""
TILE_COST, STEP_COST = 5, 3
"""What a unit of one tile costs, and for all tiles of a warp a unit of activations: instructions, about 20 for 1."""


@dataclass(frozen=True)
class Config:
    """How the kernel divides its work.

    Attributes:
        height: R, tiles that a warp multiplies with the same activations.
        places: P, warps side by side, with tiles of their own.
        parts: S, warps that share the units of a block for them.
        splits: C, blocks of a cluster, which share K.
        depth: D, slots of a warp's ring.
        early: tiles of the first slot, at least one, that are requested before the activations. Its others follow
            them, and other slots are requested once they are there.
    """

    height: int
    places: int
    parts: int
    splits: int
    depth: int
    early: int = 1

    @property
    def warps(self) -> int:
        return self.places * self.parts


def _parts(count: int, size: int) -> int:
    return -(-count // size)


def units(shape: Shape, config: Config) -> int:
    """Returns U, the units of 128 k of a warp."""
    return _parts(_parts(shape.units, config.splits), config.parts)


def columns(shape: Shape) -> int:
    """Returns the rows of activations, rounded up to whole columns of mma."""
    return _parts(shape.rows, 8) * 8


def clusters(shape: Shape, config: Config) -> int:
    """Returns how many clusters are launched."""
    return min(AT_ONCE[config.splits], shape.row_tiles // shape.halves)


def slot_bytes(shape: Shape, config: Config) -> int:
    """Returns the bytes of one ring slot: a unit of a warp's tiles, with scales and zero points."""
    runs = UNIT // shape.run
    return config.height * (shape.grouping.bits * 256 + runs * (48 if shape.has_zeros else 32))


def turns(shape: Shape, config: Config) -> int:
    """Returns how often a warp takes `height` tiles, at most."""
    tiles = _parts(shape.row_tiles // shape.halves, clusters(shape, config)) * shape.halves
    return _parts(tiles, config.places * config.height)


def places_of(shape: Shape, config: Config) -> dict[str, int]:
    """Returns where in shared memory what follows the activations begins: constants of the text, and END."""
    staged = units(shape, config) * config.parts
    ring = staged * columns(shape) * 2 * UNIT
    sums = ring + config.warps * config.depth * slot_bytes(shape, config)
    results = sums + staged * (UNIT // shape.run) * columns(shape) * 4
    taken = _parts(shape.row_tiles // shape.halves, clusters(shape, config))
    stored = _parts(taken, config.splits) * shape.halves
    barrier = results + stored * config.splits * fragments.TILE_ROWS * columns(shape) * 4
    end = barrier + 16
    # Where warps add up: in the ring, if nothing is on its way to it any more.
    apart = turns(shape, config) > 1 and config.parts > 1
    size = config.height * columns(shape) // 8 * 512 if apart else config.depth * slot_bytes(shape, config)
    return {
        "RING_AT": ring, "SUMS_AT": sums, "RESULTS_AT": results, "BARRIER_AT": barrier, "PIECES_BYTES": size,
        "PIECES_AT": end if apart else ring, "END": end + (config.warps * size if apart else 0),
    }  # fmt: skip


def shared_bytes(shape: Shape, config: Config) -> int:
    """Returns the shared memory of a block: activations, rings, sums of activations, and all it is sent."""
    return places_of(shape, config)["END"]


def launch_bytes(shape: Shape, config: Config, archs: tuple[str, ...]) -> int:
    """Returns the shared memory that a launch asks for (see `stream.launch_bytes`)."""
    return max(shared_bytes(shape, config), stream.alone_bytes(archs) if shape.dependent else 0)


def divisions(shape: Shape, archs: tuple[str, ...]) -> Iterator[Config]:
    """Yields the divisions that fit."""
    limit = min(stream.limits(archs)) - stream.RESERVED
    for splits in AT_ONCE:
        for height, most in MOST_WARPS.items():
            if height % shape.halves:
                continue  # a gate and its factor are tiles of one warp
            for parts in (1, 2, 3, 4):
                for places in range(1, most // parts + 1):
                    for depth in (3, 2):
                        config = Config(height, places, parts, splits, depth, max(height - 1, 1))
                        if shared_bytes(shape, config) <= limit:
                            yield config


def ranked(shape: Shape, archs: tuple[str, ...]) -> list[Config]:
    """Returns the divisions that fit, the best first.

    That in which the busiest of the schedulers has least to do, of those the one with most warps and deepest rings.
    """

    def cost(config: Config) -> tuple[int, ...]:
        steps = _parts(config.warps, SCHEDULERS) * units(shape, config) * turns(shape, config)
        busiest = steps * (TILE_COST * config.height + STEP_COST)
        return config.warps < FEWEST_WARPS, busiest, -config.warps, config.parts, -config.depth

    return sorted(divisions(shape, archs), key=cost)


def choose(shape: Shape, archs: tuple[str, ...]) -> Config | None:
    """Returns the division that is taken, or None if nothing fits."""
    return next(iter(ranked(shape, archs)), None)


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
    constants = {
        "BITS": bits, "K": grouping.in_features, "N": shape.out_features, "M": shape.rows,
        "GROUP": grouping.group_size, "GROUPS": grouping.groups, "RUN": shape.run, "TILES": shape.row_tiles,
        "CHUNKS": fragments.chunks(grouping.in_features), "UNITS": shape.units, "TOKENS": columns(shape),
        "R": config.height, "P": config.places, "S": config.parts, "U": units(shape, config), "C": config.splits,
        "D": config.depth, "EARLY": config.early, "TURNS": turns(shape, config), "CLUSTERS": clusters(shape, config),
        "SLOT": slot_bytes(shape, config), "SETS": tile_source.sets(bits), "ZERO": 1 << (bits - 1),
        "SECOND": tile_source.SECOND_SET, "LOW": 24 - tile_source.exponent(bits, 0),
        "HIGH": 24 - tile_source.exponent(bits, 1),
    }  # fmt: skip
    constants.update(places_of(shape, config))
    text = "\n".join(f"constexpr int {key} = {value};" for key, value in constants.items())
    both = "gate += __half2float(bias[row]); v += __half2float(bias[OUTS + row]);"
    values = {
        **stream.common_values(shape, has_bias, has_residual, out_type),
        "@OPERAND@": resident_body.OPERAND_NATURAL if natural else resident_body.OPERAND,
        "@ADD_BIAS@": (both if shape.act else "v += __half2float(bias[row]);") if has_bias else "",
        "@ADD_RESIDUAL@": "v += residual[(long long)token * OUTS + row];" if has_residual else "",
    }
    body = resident_body.BODY
    for key, value in values.items():
        body = body.replace(key, value)
    head = tile_source.PTX + tile_source.COMMON + tile_source.fragments(bits)
    head += (tile_source.LAUNCH if shape.dependent else "") + tile_source.CLUSTER + tile_source.BARRIERS
    head += tile_source.SENDING
    return f"{head}\nnamespace {name} {{\n{text}\n{body}\n}}\n"
