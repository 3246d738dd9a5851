# SPDX-License-Identifier: Apache-2.0
"""Which division of the work `pipeline` takes: the fastest by a model of its time.

A launch runs in rounds of as many blocks as fit on the GPU at once. In a turn a block is held up by the slowest of four
things: instructions, tensor cores, weights from memory, activations from L2. The constants are clocks of an H200
(benchmarks/RESULTS.md, "Quantized linear kernels"); smaller GPUs have fewer multiprocessors of much the same balance.
"""

from __future__ import annotations

from collections.abc import Iterator

from gptq_compile.kernels.cuda.pipeline import Config, row_blocks, shared_bytes
from gptq_compile.kernels.cuda.stream import RESERVED, SHARED_BYTES, UNIT, Shape
from gptq_compile.kernels.cuda.wgmma_choice import AT_ONCE

Plan = list[tuple[int | None, Config]]
"""What to run for at most how many rows of activations, ascending; None: any number."""

STEPS = (8, 16, 32, 64, None)
MANY = 4096
REGISTERS = 1 << 16
WARPS = (4, 7, 8, 12, 14, 16)
ISSUED = 1.7
"""Instructions a multiprocessor issues in a clock, of four at best."""
PRODUCT = 1.7
"""Clocks of a multiprocessor for one mma.m16n8k16."""
MEMORY, L2 = 17.0, 28.0
"""Bytes a clock that a multiprocessor gets when all of them read."""
BARRIER, ENDS, SHARING = 120.0, 3500.0, 900.0
"""Clocks of a turn's barrier, of beginning and end, and of each further part of K to be added."""


def _unpack(bits: int) -> int:
    """Returns the instructions that make the fragments of a unit of 16 weight rows."""
    return {2: 68, 3: 86, 4: 72, 8: 72}[bits]


def clocks(shape: Shape, config: Config, rows: int) -> float:
    """Returns the time that the model predicts for so many rows of activations."""
    # A multiprocessor has four schedulers: with six warps two of them have half as much to do.
    warps, columns = -(-config.warps * config.splits // 4) * 4, config.tokens // 8
    tiles = warps * config.height
    issued = _unpack(shape.grouping.bits) + columns * (12 + 4 / config.height) + 30 / config.height
    turn = max(
        tiles * issued / ISSUED,
        tiles * columns * 8 * PRODUCT,
        tiles * shape.grouping.bits * 256 / MEMORY,
        config.splits * config.tokens * UNIT * 2 / L2,
    )
    turns = -(-shape.units // (config.splits * config.blocks))
    rounds = -(-row_blocks(shape, config) * -(-rows // config.tokens) // AT_ONCE[config.blocks])
    return rounds * (turns * (turn + BARRIER) + ENDS + SHARING * (config.splits * config.blocks - 1))


def divisions(shape: Shape, tokens: int, archs: tuple[str, ...], clusters: bool, natural: bool) -> Iterator[Config]:
    """Yields the divisions for `tokens` rows of a block that fit into registers and shared memory."""
    limit = min(SHARED_BYTES.get(int("".join(filter(str.isdigit, arch))), 99 << 10) for arch in archs) - RESERVED
    for height in (1, 2):
        if height * (UNIT // shape.run) > 8:
            continue
        needed = height * tokens + 16 * height + tokens // 2 + 64
        for warps in WARPS:
            for splits in (1, 2, 4):
                for blocks in AT_ONCE if clusters else (1,):
                    if warps * splits > 16 or 32 * warps * splits * needed > REGISTERS:
                        continue
                    if splits * blocks > 1 and shape.units < 3 * splits * blocks:
                        continue
                    for depth in (6, 5, 4, 3):
                        config = Config(warps, height, tokens, splits, blocks, depth)
                        if shared_bytes(shape, config, natural) <= limit:
                            yield config
                            break


def best(shape: Shape, rows: int, archs: tuple[str, ...], clusters: bool, natural: bool) -> Config | None:
    """Returns the division for so many rows that the model finds fastest, or None if none fits."""
    tokens = next((width for width in (8, 16, 32) if rows <= width), 64)
    found = divisions(shape, tokens, archs, clusters, natural)
    return min(found, key=lambda config: clocks(shape, config, rows), default=None)


def choose(shape: Shape, archs: tuple[str, ...], clusters: bool, natural: bool) -> Plan | None:
    """Returns the divisions for `shape.rows` rows, or for any number of them if that is 0; None if none fits."""
    plan: Plan = []
    for most in (None,) if shape.rows else STEPS:
        config = best(shape, shape.rows or most or MANY, archs, clusters, natural)
        if config is None:
            return None
        if plan and plan[-1][1] == config:
            plan.pop()
        plan.append((most, config))
    return plan
