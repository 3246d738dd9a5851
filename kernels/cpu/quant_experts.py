# SPDX-License-Identifier: Apache-2.0
"""Quantized linear layers of mixtures of experts on the CPU: each row names the expert whose weight multiplies it.

The experts' rows lie below one another in the `LaneInterleaved` layout, so that an expert is a run of tiles, and a row
is one pass of the dense decode kernel over its expert's tiles (see `quant_linear`).
"""

from __future__ import annotations

from typing import Any

from gptq_compile.kernels import tirx_math as tm
from gptq_compile.kernels.cpu.quant_linear import FLOATS, Tensors, fused_rows, prescaled
from gptq_compile.kernels.layouts import LANES, grouping_of, layout_for, slab_case
from gptq_compile.kernels.registry import Case, Kernel, Refusal
from gptq_compile.kernels.script import Function, script
from gptq_compile.kernels.target import Target

Expr = Any


def refuse(case: Case, target: Target) -> Refusal | None:
    """Why a kernel of quantized experts cannot do a case, or None."""
    if case.dtype not in FLOATS:
        return Refusal(f"needs float32 or float16 activations, not {case.dtype}")
    try:
        grouping_of(case)
    except ValueError as error:
        return Refusal(str(error))
    return None


class ExpertTensors(Tensors):
    """The parameters (x[m, K], packed..., expert[m] int64, [bias[E, N]], out[m, N]), declared in this order."""

    def __init__(self, f: Function, case: Case, target: Target) -> None:
        slab = slab_case(case)
        experts, n = int(case["experts"]), int(case["out_features"])
        self.case = case
        self.grouping = grouping_of(case)
        self.rows = tm.rows(case, "m")
        self.x = f.tensor("x", (self.rows, case["in_features"]), case.dtype)
        packed = {
            name: f.tensor(name, shape, dtype)
            for name, (shape, dtype) in layout_for(slab, target).tensors(slab).items()
        }
        self.words, self.scales, self.zeros = packed["qweight"], packed["scales"], packed.get("zeros")
        self.expert = f.tensor("expert", (self.rows,), "int64")
        self.bias = f.tensor("bias", (experts, n), case.dtype) if case["has_bias"] else None
        self.out_dtype = case.dtype
        self.out = f.tensor("out", (self.rows, n), self.out_dtype)
        self.experts, self.tiles = experts, -(-n // LANES)

    def chosen(self, row: Expr) -> Expr:
        """The expert of a row, inside the table whatever the router says."""
        ir = script()
        return ir.max(ir.min(self.expert[row], ir.int64(self.experts - 1)), ir.int64(0))

    def column_tile(self, tile: Expr, row: Expr) -> Expr:
        return tile - self.chosen(row) * self.tiles

    def bias_at(self, row: Expr, column: Expr) -> Expr | None:
        return None if self.bias is None else self.bias[self.chosen(row), column]


def _build(case: Case, target: Target) -> Any:
    ir = script()
    with Function("quant_expert_linear") as f:
        t = ExpertTensors(f, case, target)
        x, sums = prescaled(t)
        with ir.parallel(t.tiles) as tile, ir.serial(t.rows) as row:
            fused_rows(t, x, sums, t.chosen(row) * t.tiles + tile, (row,), t.grouping)
    return f.result()


KERNELS = (Kernel("cpu.quant_expert_linear", "quant_expert_linear", refuse, _build),)
