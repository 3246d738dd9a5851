# SPDX-License-Identifier: Apache-2.0
"""Quantized linear layers of mixtures of experts on CUDA: each row names the expert whose weight multiplies it.

The experts' rows lie below one another in the `RowWords` layout. A warp makes one output of one row: lanes over blocks
of codes, float32 sums.
"""

from __future__ import annotations

from typing import Any

from gptq_compile.kernels.cpu.quant_experts import ExpertTensors, refuse
from gptq_compile.kernels.cuda.block import shuffle_xor
from gptq_compile.kernels.layouts import padded_rows
from gptq_compile.kernels.registry import Case, Kernel
from gptq_compile.kernels.script import Function, local, script, store, when
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.words import block_codes, block_words, fields

WARPS = 4

Expr = Any


def _build(case: Case, target: Target) -> Any:
    ir = script()
    with Function("quant_expert_linear") as f:
        t = ExpertTensors(f, case, target)
        n, grouping = int(case["out_features"]), t.grouping
        bits, size = grouping.bits, grouping.group_size
        blocks = -(-size // block_codes(bits))
        total = grouping.row_words // block_words(bits)
        with (
            # Rows are many (tokens times experts of each), and only x reaches beyond 65535.
            ir.thread_binding(t.rows, thread="blockIdx.x") as row,
            ir.thread_binding(-(-n // WARPS), thread="blockIdx.y") as tile,
            ir.thread_binding(32 * WARPS, thread="threadIdx.x") as thread,
        ):
            column, lane = tile * WARPS + thread // 32, thread % 32
            weight_row = t.chosen(row) * padded_rows(case) + ir.min(column, n - 1)
            sums = local(1)
            store(sums, (0,), ir.float32(0))
            with ir.serial(-(-total // 32)) as i:
                index = i * 32 + lane
                with when(index < total):
                    group, offset = index // blocks, index % blocks * block_codes(bits)
                    zero = (
                        ir.int32(1 << (bits - 1)) if t.zeros is None else ir.cast(t.zeros[weight_row, group], "int32")
                    )
                    part = local(1)
                    store(part, (0,), ir.float32(0))
                    for j, parts in enumerate(fields(bits)):
                        k = group * size + offset + j
                        with when(ir.And(offset + j < size, k < grouping.in_features)):
                            code = ir.int32(0)
                            for piece in parts:
                                word = t.words[weight_row, index * block_words(bits) + piece.word]
                                field = (word >> ir.uint32(piece.shift)) & ir.uint32((1 << piece.width) - 1)
                                code = code + (ir.cast(field, "int32") << ir.int32(piece.low))
                            value = ir.cast(code - zero, "float32") * ir.cast(t.x[row, k], "float32")
                            store(part, (0,), part[0] + value)
                    store(sums, (0,), sums[0] + ir.cast(t.scales[weight_row, group], "float32") * part[0])
            for step in range(5):
                store(sums, (0,), sums[0] + shuffle_xor(sums[0], 1 << step))
            with when(ir.And(lane == 0, column < n)):
                value = sums[0]
                bias = t.bias_at(row, column)
                if bias is not None:
                    value = value + ir.cast(bias, "float32")
                store(t.out, (row, column), ir.cast(value, t.out_dtype))
    return f.result()


KERNELS = (Kernel("cuda.quant_expert_linear", "quant_expert_linear", refuse, _build),)
