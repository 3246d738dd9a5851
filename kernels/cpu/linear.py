# SPDX-License-Identifier: Apache-2.0
"""Unquantized linear layers on the CPU (the language-model head): out = x @ w.T + bias, weights [N, K] row-major.

The weights stay in the checkpoint's layout, so SIMD lanes run along K: a register tile of token rows x weight rows
holds one vector of partial sums per pair and adds its lanes up at the end.
"""

from __future__ import annotations

from typing import Any

from gptq_compile.kernels.registry import Case, Kernel, Refusal
from gptq_compile.kernels.script import Function, on_stack, script, store, when
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import tvm

WEIGHT_ROWS = 4
TOKEN_ROWS = 2
"""2 x 4 tiles of 8 lanes: 8 sums and what is being loaded stay in the 16 AVX registers."""
FLOATS = ("float32", "float16")

Expr = Any


def _accepts(case: Case, target: Target) -> Refusal | None:
    for what, dtype in (
        ("activations", case.dtype),
        ("weights", case.get("weight_dtype", case.dtype)),
        ("outputs", case.get("out_dtype", case.dtype)),
    ):
        if dtype not in FLOATS:
            return Refusal(f"needs float32 or float16 {what}, not {dtype}")
    return None


def _build(case: Case, target: Target) -> Any:
    """Builds (x[m, K], w[N, K], [bias[N]], out[m, N]); attributes weight_dtype and out_dtype default to dtype."""
    ir = script()
    n, k = case["out_features"], case["in_features"]
    out_dtype = case.get("out_dtype", case.dtype)
    token_rows = min(TOKEN_ROWS, case.rows or TOKEN_ROWS)
    lanes = 16 if token_rows == 1 else 8
    with Function("linear") as f:
        rows = f.symbol() if case.rows is None else case.rows
        x = f.tensor("x", (rows, k), case.dtype)
        w = f.tensor("w", (n, k), case.get("weight_dtype", case.dtype))
        bias = f.tensor("bias", (n,), case.dtype) if case["has_bias"] else None
        out = f.tensor("out", (rows, n), out_dtype)
        with (
            ir.parallel(-(-n // WEIGHT_ROWS)) as block,
            ir.serial((rows + token_rows - 1) // token_rows) as tile,
        ):
            sums = dot_tile(x, w, rows, n, k, tile * token_rows, block * WEIGHT_ROWS, token_rows, lanes)
            for r in range(token_rows):
                for c in range(WEIGHT_ROWS):
                    row, column = tile * token_rows + r, block * WEIGHT_ROWS + c
                    with when(ir.And(row < rows, column < n)):
                        value = lane_sum(sums[r][c], lanes)
                        if bias is not None:
                            value = value + ir.cast(bias[column], "float32")
                        store(out, (row, column), ir.cast(value, out_dtype))
    return f.result()


def dot_tile(
    x: Any, w: Any, rows: Expr, n: int, k: int, row: Expr, column: Expr, token_rows: int, lanes: int
) -> list[list[Any]]:
    """Emits the lane-wise dot products of token_rows x WEIGHT_ROWS pairs; rows past the end repeat the last one."""
    ir = script()
    sums = [[on_stack(lanes) for _ in range(WEIGHT_ROWS)] for _ in range(token_rows)]
    loaded = [on_stack(lanes) for _ in range(WEIGHT_ROWS)]
    tokens = [ir.min(row + r, rows - 1) for r in range(token_rows)]
    columns = [ir.min(column + c, n - 1) for c in range(WEIGHT_ROWS)]
    for line in sums:
        for one in line:
            with ir.vectorized(lanes) as lane:
                store(one, (lane,), ir.float32(0))

    def step(start: Expr, width: int) -> None:
        for c in range(WEIGHT_ROWS):
            with ir.vectorized(width) as lane:
                store(loaded[c], (lane,), ir.cast(w[columns[c], start + lane], "float32"))
        for r in range(token_rows):
            for c in range(WEIGHT_ROWS):
                with ir.vectorized(width) as lane:
                    value = ir.cast(x[tokens[r], start + lane], "float32")
                    store(sums[r][c], (lane,), sums[r][c][lane] + loaded[c][lane] * value)

    if k >= lanes:
        with ir.serial(k // lanes) as i:
            step(i * lanes, lanes)
    if k % lanes:
        step(k // lanes * lanes, k % lanes)
    return sums


def lane_sum(vector: Any, lanes: int) -> Expr:
    """Returns the sum of all lanes; shuffles, because narrower loads would pin the vector to memory."""
    tir = tvm.tirx
    value = tir.BufferLoad(vector, [tir.Ramp(0, 1, lanes)])
    while lanes > 1:
        lanes //= 2
        value = tir.Shuffle([value], list(range(lanes))) + tir.Shuffle([value], list(range(lanes, 2 * lanes)))
    return value


KERNELS = (Kernel("cpu.linear.dot", "linear", _accepts, _build),)
