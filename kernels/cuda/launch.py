# SPDX-License-Identifier: Apache-2.0
"""Programmatic dependent launch: a kernel may start before the one in front of it has ended.

What takes part waits (``griddepcontrol.wait``) before it touches anything that another kernel of the step wrote or
reads, so the chain of waits orders everything as plain launches would; what comes before the wait (requests for weights
and for what earlier steps cached) overlaps with the end of the kernel in front. A kernel that does not take part is
launched after all in front of it have ended; a step begins (embedding) and ends (sampling) with such ones.
CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"; sm_90 and newer.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi

from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import tvm

_TAG = "tirx.use_programtic_dependent_launch"  # as TVM spells it
_DYNAMIC = "tirx.use_dyn_shared_memory"

MIN_BLOCKS = "tirx.launch_bounds_min_blocks_per_sm"
"""Attribute: how many blocks shall fit on a multiprocessor. Without it ptxas gives 448 threads 72 registers, for two
blocks, and spills where one block was meant."""


def supported(target: Target) -> bool:
    """Whether every architecture of the target has dependent launches."""
    return target.kind == "cuda" and all(_major(arch) >= 9 for arch in target.archs)


def _major(arch: str) -> int:
    return int("".join(filter(str.isdigit, arch))[:-1])


def dependent(func: Any) -> Any:
    """Returns a PrimFunc of one kernel whose launch does not wait for the kernel in front to end."""
    tags: list[str] = []
    dynamic: list[bool] = []

    def visit(node: Any) -> None:
        if node.attr_key == "thread_extent":
            tags.append(node.node.thread_tag)

    shared = (tvm.tirx.AllocBuffer, lambda node: dynamic.append(node.buffer.scope() == "shared.dyn"))
    tvm_ffi.structural_walk(func.body, [(tvm.tirx.AttrStmt, visit), shared], order="pre")
    return func.with_attr("tirx.kernel_launch_params", [*tags, _TAG, *([_DYNAMIC] if any(dynamic) else [])])
