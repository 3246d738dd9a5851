# SPDX-License-Identifier: Apache-2.0
"""Unquantized linear layers on CUDA (the language-model head): out = x @ w.T + bias, weights [N, K] row-major.

Half weights use `row_linear` for few rows, else the tensor-core generator of `mma_linear`; everything else a warp per
weight row with float32 sums.
"""

from __future__ import annotations

from typing import Any

from gptq_compile.kernels.cuda import mma_linear, row_linear
from gptq_compile.kernels.cuda.quant_linear import FLOATS, PLAIN_TOKENS, PLAIN_WARPS, finish
from gptq_compile.kernels.registry import Case, Kernel, Refusal
from gptq_compile.kernels.script import Function, local, script, store
from gptq_compile.kernels.target import Target


def _accepts_plain(case: Case, target: Target) -> Refusal | None:
    for what, dtype in (
        ("activations", case.dtype),
        ("weights", case.get("weight_dtype", case.dtype)),
        ("outputs", case.get("out_dtype", case.dtype)),
    ):
        if dtype not in FLOATS:
            return Refusal(f"needs float32 or float16 {what}, not {dtype}")
    return None


def _accepts_tiles(case: Case, target: Target) -> Refusal | None:
    refusal = _accepts_plain(case, target)
    if refusal is not None:
        return refusal
    if case.get("weight_dtype", case.dtype) != "float16":
        return Refusal(f"needs float16 weights, not {case.get('weight_dtype', case.dtype)}")
    reason = mma_linear.why_not(16, case["in_features"], 0, 1, case.dtype)
    return Refusal(reason) if reason else None


def _accepts_decode(case: Case, target: Target) -> Refusal | None:
    if case.rows is None or case.rows > mma_linear.TOKENS:
        return Refusal(f"is for 1 to {mma_linear.TOKENS} rows known at compile time, not {case.rows or 'symbolic'}")
    return _accepts_tiles(case, target)


def _tensors(f: Function, case: Case) -> tuple[mma_linear.Weights, mma_linear.Problem]:
    """Declares (x[m, K], w[N, K], [bias[N]], out[m, N])."""
    n, k = case["out_features"], case["in_features"]
    rows = f.symbol() if case.rows is None else case.rows
    x = f.tensor("x", (rows, k), case.dtype)
    w = f.tensor("w", (n, k), case.get("weight_dtype", case.dtype))
    bias = f.tensor("bias", (n,), case.dtype) if case["has_bias"] else None
    out_dtype = case.get("out_dtype", case.dtype)
    out = f.tensor("out", (rows, n), out_dtype)
    weights = mma_linear.Weights(words=w, bits=16, out_features=n, in_features=k)
    return weights, mma_linear.Problem(x, bias, out, rows, out_dtype)


def _decode(case: Case, target: Target) -> Any:
    """Builds the kernel for 1 to 8 rows."""
    with Function("linear") as f:
        mma_linear.decode(*_tensors(f, case))
    return f.result()


def _tiles(case: Case, target: Target) -> Any:
    """Builds the tensor-core kernel for any number of rows."""
    with Function("linear") as f:
        mma_linear.tiles(*_tensors(f, case))
    return f.result()


def _plain(case: Case, target: Target) -> Any:
    """Builds the kernel without tensor cores: a warp per weight row and up to four token rows."""
    ir = script()
    with Function("linear") as f:
        w, p = _tensors(f, case)
        k = w.in_features
        with (
            ir.launch_thread("blockIdx.x", -(-w.out_features // PLAIN_WARPS)) as block,
            ir.launch_thread("blockIdx.y", ir.cast((p.rows + PLAIN_TOKENS - 1) // PLAIN_TOKENS, "int32")) as tile,
            ir.launch_thread("threadIdx.x", 32 * PLAIN_WARPS) as thread,
        ):
            row, lane = block * PLAIN_WARPS + thread // 32, thread % 32
            safe = ir.min(row, w.out_features - 1)
            sums = local(PLAIN_TOKENS)
            for t in range(PLAIN_TOKENS):
                store(sums, (t,), ir.float32(0))
            with ir.serial((k + 31 - lane) // 32) as i:
                for t in range(PLAIN_TOKENS):
                    token = ir.min(tile * PLAIN_TOKENS + t, p.rows - 1)
                    weight = ir.cast(w.words[safe, i * 32 + lane], "float32")
                    store(sums, (t,), sums[t] + weight * ir.cast(p.x[token, i * 32 + lane], "float32"))
            finish(w, p, sums, row, tile, lane)
    return f.result()


KERNELS = (
    Kernel("cuda.linear.rows", "linear", row_linear.accepts, row_linear.build),
    Kernel("cuda.linear.decode_mma", "linear", _accepts_decode, _decode),
    Kernel("cuda.linear.tiles_mma", "linear", _accepts_tiles, _tiles),
    Kernel("cuda.linear.plain", "linear", _accepts_plain, _plain),
)
