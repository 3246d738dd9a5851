# SPDX-License-Identifier: Apache-2.0
"""The k largest of every row, in order, on the CPU: an element's rank is the number of elements before it.

Meant for short rows (the experts a router chooses from): the work is quadratic in the width, but vectorizes. Of equal
elements the one with the lower index comes first.
"""

from __future__ import annotations

from typing import Any

from gptq_compile.kernels import tirx_math as tm
from gptq_compile.kernels.registry import Case, Kernel, Refusal
from gptq_compile.kernels.script import Function, local, script, store, when
from gptq_compile.kernels.target import Target

MOST_WIDTH = 4096
DTYPES = ("float32", "float16")

Expr = Any


def accepts(case: Case, target: Target) -> Refusal | None:
    """Refuses widths for which ranks would be slow, and types without a kernel."""
    if case.dtype not in DTYPES:
        return Refusal(f"needs float32 or float16, not {case.dtype}")
    if case["width"] > MOST_WIDTH:
        return Refusal(f"ranks at most {MOST_WIDTH} elements a row, not {case['width']}")
    return None


class TopkTensors:
    """The parameters (x[m, W], values[m, k], indices[m, k] int64), declared in this order."""

    def __init__(self, f: Function, case: Case) -> None:
        self.width, self.k, self.largest = int(case["width"]), int(case["k"]), bool(case.get("largest", True))
        self.rows = tm.rows(case, "m")
        self.x = f.tensor("x", (self.rows, self.width), case.dtype)
        self.values = f.tensor("values", (self.rows, self.k), case.dtype)
        self.indices = f.tensor("indices", (self.rows, self.k), "int64")

    def place(self, row: Expr, j: Expr) -> None:
        """Emits the rank of ``x[row, j]`` and its stores if it is among the first k."""
        ir = script()
        rank = local(1, "int32")
        store(rank, (0,), ir.int32(0))
        with ir.serial(self.width) as other:
            a, b = self.x[row, other], self.x[row, j]
            first = a > b if self.largest else a < b
            before = ir.Or(first, ir.And(a == b, other < j))
            store(rank, (0,), rank[0] + ir.cast(before, "int32"))
        with when(rank[0] < self.k):
            store(self.values, (row, rank[0]), self.x[row, j])
            store(self.indices, (row, rank[0]), ir.cast(j, "int64"))


def _build(case: Case, target: Target) -> Any:
    ir = script()
    with Function("topk") as f:
        p = TopkTensors(f, case)
        loop = ir.serial if case.rows is not None and case.rows * p.width**2 < 1 << 16 else ir.parallel
        with loop(p.rows) as row, ir.serial(p.width) as j:
            p.place(row, j)
    return f.result()


KERNELS = (Kernel("cpu.topk", "topk", accepts, _build),)
