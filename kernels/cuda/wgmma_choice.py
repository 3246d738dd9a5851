# SPDX-License-Identifier: Apache-2.0
"""Which division of the work `wgmma` takes: the fastest by a model of its time, fitted to measurements.

A launch runs in rounds of as many blocks as fit on the GPU at once; a round takes the units of 128 k of one block, and
beginning and end. Both were measured on an H200 with 4-bit weights in groups of 128 (benchmarks/RESULTS.md, "Quantized
linear kernels"); predictions for the measured divisions are off by 10 % on average.
"""

from __future__ import annotations

from gptq_compile.kernels.cuda.stream import Shape
from gptq_compile.kernels.cuda.wgmma import SHARED_BYTES, Config, Plan, blocks_along_rows, shared_bytes

AT_ONCE = {1: 132, 2: 66, 3: 39, 4: 30, 6: 17}
"""Blocks of a cluster -> clusters that an H200 runs at once, one block a multiprocessor (as CUDA reports them)."""
UNIT = {
    (128, 16): 0.43, (128, 32): 0.50, (128, 64): 0.65, (128, 128): 0.92,
    (192, 16): 0.56, (192, 32): 0.69, (192, 64): 0.90, (192, 128): 1.18,
    (256, 16): 0.68, (256, 32): 0.78, (256, 64): 1.00, (256, 128): 1.50,
}  # fmt: skip
"""(weight rows, tokens) of a block -> microseconds for 128 k."""
ENDS = 4.0
SHARING = 2.2
"""Microseconds of beginning and end, and of adding up 256 x 128 results with one more block of the cluster."""
STEPS = (16, 32, 64, 128, 256, 512, 1024, None)
"""Rows up to which a symbolic number of rows gets a kernel of its own, and any number."""
MANY = 4096


def _config(shape: Shape, rows: int, tokens: int, splits: int) -> Config | None:
    """Returns a block's division among warps with as deep queues as fit, or None."""
    groups, height = {128: (2, 1), 192: (3, 1), 256: (2, 2) if tokens >= 64 else (4, 1)}[rows]
    registers = (224, 56) if (rows, tokens) == (256, 128) else None
    stages = 6 if tokens <= 32 else 4
    for held, depth in ((stages, 4), (stages, 3), (stages - 1, 3), (3, 3)):
        config = Config(groups, height, tokens, held, depth, splits, registers)
        if shared_bytes(shape, config) <= SHARED_BYTES:
            return config
    return None


def microseconds(shape: Shape, config: Config, rows: int) -> float:
    """Returns the time that the model predicts for so many rows of activations."""
    tiles = blocks_along_rows(shape, config) * -(-rows // config.tokens)
    rounds = -(-tiles // AT_ONCE[config.splits])
    share = (config.splits - 1) * SHARING * config.rows * config.tokens / (256 * 128)
    return rounds * (-(-shape.units // config.splits) * UNIT[config.rows, config.tokens] + ENDS + share)


def best(shape: Shape, rows: int) -> Config:
    """Returns the division for so many rows of activations that the model finds fastest."""
    tokens = next((width for width in (16, 32, 64) if rows <= width), 128)
    found = [_config(shape, high, tokens, splits) for high in (256, 192, 128) for splits in AT_ONCE]
    # Fewer units than a ring is deep are not worth a block.
    fitting = [c for c in found if c is not None and (c.splits == 1 or shape.units >= 3 * c.splits)]
    return min(fitting, key=lambda config: microseconds(shape, config, rows))


def choose(shape: Shape) -> Plan:
    """Returns the divisions for `shape.rows` rows, or for any number of them if that is 0."""
    if shape.rows:
        return [(None, best(shape, shape.rows))]
    plan: Plan = []
    for most in STEPS:
        config = best(shape, most or MANY)
        if plan and plan[-1][1] == config:
            plan.pop()
        plan.append((most, config))
    return plan
