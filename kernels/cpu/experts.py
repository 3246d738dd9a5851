# SPDX-License-Identifier: Apache-2.0
"""Linear layers of mixtures of experts on the CPU: each row names the expert whose weight multiplies it.

No weight is gathered: a block of output features visits all rows and reads the rows of each one's expert in place.
"""

from __future__ import annotations

from typing import Any

from gptq_compile.kernels import tirx_math as tm
from gptq_compile.kernels.attention_params import refuse_dtype
from gptq_compile.kernels.cpu.linear import WEIGHT_ROWS, dot_tile, lane_sum
from gptq_compile.kernels.registry import Case, Kernel
from gptq_compile.kernels.script import Function, on_stack, script, store, when
from gptq_compile.kernels.target import Target

LANES = 16

Expr = Any


class ExpertTensors:
    """The parameters (x[m, K], w, expert[m] int64, [bias[E, N]], out[m, N]), declared in this order.

    ``w`` is [E, N, K], or [E, K, N] if ``transposed``.
    """

    def __init__(self, f: Function, case: Case) -> None:
        experts, n, k = int(case["experts"]), int(case["out_features"]), int(case["in_features"])
        self.experts, self.out_features, self.in_features = experts, n, k
        self.rows = tm.rows(case, "m")
        self.dtype = case.dtype
        self.x = f.tensor("x", (self.rows, k), case.dtype)
        shape = (experts, k, n) if case["transposed"] else (experts, n, k)
        self.w = f.tensor("w", shape, case.get("weight_dtype", case.dtype))
        self.expert = f.tensor("expert", (self.rows,), "int64")
        self.bias = f.tensor("bias", (experts, n), case.dtype) if case["has_bias"] else None
        self.out = f.tensor("out", (self.rows, n), case.dtype)

    def chosen(self, row: Expr) -> Expr:
        """The expert of a row, inside the table whatever the router says."""
        ir = script()
        return ir.max(ir.min(self.expert[row], ir.int64(self.experts - 1)), ir.int64(0))

    def write(self, row: Expr, column: Expr, value: Expr) -> None:
        """Emits ``out[row, column] = value + bias``."""
        ir = script()
        if self.bias is not None:
            value = value + ir.cast(self.bias[self.chosen(row), column], "float32")
        store(self.out, (row, column), ir.cast(value, self.dtype))


class _Matrix:
    """One expert's weight as a two-dimensional tensor."""

    def __init__(self, w: Any, expert: Expr) -> None:
        self.w, self.expert = w, expert

    def __getitem__(self, index: tuple[Expr, Expr]) -> Expr:
        return self.w[self.expert, index[0], index[1]]


def _dot(case: Case, target: Target) -> Any:
    """Weights [E, N, K]: lanes along K, as the plain linear does."""
    ir = script()
    with Function("expert_linear") as f:
        p = ExpertTensors(f, case)
        n = p.out_features
        with ir.parallel(-(-n // WEIGHT_ROWS)) as block, ir.serial(p.rows) as row:
            matrix = _Matrix(p.w, p.chosen(row))
            sums = dot_tile(p.x, matrix, p.rows, n, p.in_features, row, block * WEIGHT_ROWS, 1, LANES)
            for c in range(WEIGHT_ROWS):
                with when(block * WEIGHT_ROWS + c < n):
                    p.write(row, block * WEIGHT_ROWS + c, lane_sum(sums[0][c], LANES))
    return f.result()


def _columns(case: Case, target: Target) -> Any:
    """Weights [E, K, N]: lanes along N."""
    ir = script()
    with Function("expert_linear") as f:
        p = ExpertTensors(f, case)
        n = p.out_features

        def tile(row: Expr, start: Expr, width: int) -> None:
            sums = on_stack(width)
            with ir.vectorized(width) as lane:
                store(sums, (lane,), ir.float32(0))
            with ir.serial(p.in_features) as k, ir.vectorized(width) as lane:
                weight = ir.cast(p.w[p.chosen(row), k, start + lane], "float32")
                store(sums, (lane,), sums[lane] + weight * ir.cast(p.x[row, k], "float32"))
            with ir.vectorized(width) as lane:
                p.write(row, start + lane, sums[lane])

        if n >= LANES:
            with ir.parallel(n // LANES) as block, ir.serial(p.rows) as row:
                tile(row, block * LANES, LANES)
        if n % LANES:
            with ir.parallel(p.rows) as row:
                tile(row, n // LANES * LANES, n % LANES)
    return f.result()


def _build(case: Case, target: Target) -> Any:
    return (_columns if case["transposed"] else _dot)(case, target)


KERNELS = (Kernel("cpu.expert_linear", "expert_linear", lambda case, target: refuse_dtype(case), _build),)
