# SPDX-License-Identifier: Apache-2.0
"""The k largest of every row, in order, on CUDA: a block per row, a thread per element, no synchronization."""

from __future__ import annotations

from typing import Any

from gptq_compile.kernels.cpu.topk import TopkTensors, accepts
from gptq_compile.kernels.cuda.block import WARP
from gptq_compile.kernels.registry import Case, Kernel
from gptq_compile.kernels.script import Function, script, when
from gptq_compile.kernels.target import Target

_MOST_THREADS = 256


def _build(case: Case, target: Target) -> Any:
    ir = script()
    with Function("topk") as f:
        p = TopkTensors(f, case)
        threads = min(_MOST_THREADS, -(-p.width // WARP) * WARP)
        with (
            ir.thread_binding(p.rows, thread="blockIdx.x") as row,
            ir.thread_binding(-(-p.width // threads), thread="blockIdx.y") as block,
            ir.thread_binding(threads, thread="threadIdx.x") as thread,
            when(block * threads + thread < p.width),
        ):
            p.place(row, block * threads + thread)
    return f.result()


KERNELS = (Kernel("cuda.topk", "topk", accepts, _build),)
