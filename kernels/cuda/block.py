# SPDX-License-Identifier: Apache-2.0
"""Reductions over the threads of a CUDA block, for use inside a PrimFunc."""

from __future__ import annotations

from typing import Any

from gptq_compile.kernels.tvm_env import T

WARP = 32
FULL_MASK = 0xFFFFFFFF


def shuffle_xor(value: Any, offset: int) -> Any:
    """The value of the lane whose number differs by `offset` (xor) in the calling warp; all lanes must call."""
    return T.tvm_warp_shuffle_xor(T.uint32(FULL_MASK), value, offset, WARP, WARP)


@T.inline
def block_sum(value, shared, thread, threads):
    """value[0] = sum over the block; `shared` has one element per warp. Every thread must call; order is fixed."""
    for step in T.unroll(5):
        value[0] = value[0] + shuffle_xor(value[0], 1 << step)
    T.tvm_storage_sync("shared")
    if thread % WARP == 0:
        shared[thread // WARP] = value[0]
    T.tvm_storage_sync("shared")
    value[0] = shared[0]
    for warp in range(threads // WARP - 1):
        value[0] = value[0] + shared[warp + 1]


@T.inline
def block_max(value, shared, thread, threads):
    """value[0] = maximum over the block; as `block_sum`."""
    for step in T.unroll(5):
        value[0] = T.max(value[0], shuffle_xor(value[0], 1 << step))
    T.tvm_storage_sync("shared")
    if thread % WARP == 0:
        shared[thread // WARP] = value[0]
    T.tvm_storage_sync("shared")
    value[0] = shared[0]
    for warp in range(threads // WARP - 1):
        value[0] = T.max(value[0], shared[warp + 1])
