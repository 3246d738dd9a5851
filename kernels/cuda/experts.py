# SPDX-License-Identifier: Apache-2.0
"""Linear layers of mixtures of experts on CUDA: each row names the expert whose weight multiplies it.

Weights are read in place, with float32 sums. [E, N, K]: a warp per row and output feature. [E, K, N]: a thread per row
and output feature, neighbours reading neighbours.
"""

from __future__ import annotations

from typing import Any

from gptq_compile.kernels.attention_params import refuse_dtype
from gptq_compile.kernels.cpu.experts import ExpertTensors
from gptq_compile.kernels.cuda.block import WARP, shuffle_xor
from gptq_compile.kernels.registry import Case, Kernel
from gptq_compile.kernels.script import Function, local, script, store, when
from gptq_compile.kernels.target import Target

WARPS = 8
THREADS = 128


def _dot(case: Case, target: Target) -> Any:
    ir = script()
    with Function("expert_linear") as f:
        p = ExpertTensors(f, case)
        n, k = p.out_features, p.in_features
        with (
            # Rows are many (tokens times experts of each), and only x reaches beyond 65535.
            ir.thread_binding(p.rows, thread="blockIdx.x") as row,
            ir.thread_binding(-(-n // WARPS), thread="blockIdx.y") as block,
            ir.thread_binding(WARP * WARPS, thread="threadIdx.x") as thread,
        ):
            column, lane = block * WARPS + thread // WARP, thread % WARP
            safe = ir.min(column, n - 1)
            total = local(1)
            store(total, (0,), ir.float32(0))
            with ir.serial((k + WARP - 1 - lane) // WARP) as i:
                weight = ir.cast(p.w[p.chosen(row), safe, i * WARP + lane], "float32")
                store(total, (0,), total[0] + weight * ir.cast(p.x[row, i * WARP + lane], "float32"))
            for step in range(5):
                store(total, (0,), total[0] + shuffle_xor(total[0], 1 << step))
            with when(ir.And(lane == 0, column < n)):
                p.write(row, column, total[0])
    return f.result()


def _columns(case: Case, target: Target) -> Any:
    ir = script()
    with Function("expert_linear") as f:
        p = ExpertTensors(f, case)
        n = p.out_features
        with (
            ir.thread_binding(p.rows, thread="blockIdx.x") as row,
            ir.thread_binding(-(-n // THREADS), thread="blockIdx.y") as block,
            ir.thread_binding(THREADS, thread="threadIdx.x") as thread,
        ):
            column = block * THREADS + thread
            with when(column < n):
                total = local(1)
                store(total, (0,), ir.float32(0))
                with ir.serial(p.in_features) as k:
                    weight = ir.cast(p.w[p.chosen(row), k, column], "float32")
                    store(total, (0,), total[0] + weight * ir.cast(p.x[row, k], "float32"))
                p.write(row, column, total[0])
    return f.result()


def _build(case: Case, target: Target) -> Any:
    return (_columns if case["transposed"] else _dot)(case, target)


KERNELS = (Kernel("cuda.expert_linear", "expert_linear", lambda case, target: refuse_dtype(case), _build),)
