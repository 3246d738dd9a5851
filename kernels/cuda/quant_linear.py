# SPDX-License-Identifier: Apache-2.0
"""Quantized linear layers on CUDA.

Over `FragmentTiles`, fast to slow: a stream of the weights for at most 16 rows (`stationary` and `resident`, which
share K among warps and blocks, and `stream`), tensor cores for any number of rows (`wgmma` in code for sm_90a alone,
else `pipeline`), and a plain kernel for float32 activations. Over `RowWords`, the layout of the shapes that do not fit
in tiles: tensor cores (`mma_linear`) for at most 8 and for any number of rows, and a plain kernel for what those
refuse: a warp per weight row, lanes over blocks of codes, float32 sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gptq_compile.kernels import fragments
from gptq_compile.kernels.cuda import (
    mma_linear,
    pipeline_linear,
    resident_linear,
    stationary_linear,
    tile_linear,
    wgmma_linear,
)
from gptq_compile.kernels.cuda.warp import warp_sum
from gptq_compile.kernels.layouts import grouping_of, layout_for
from gptq_compile.kernels.registry import Case, Kernel, Refusal
from gptq_compile.kernels.script import Function, local, script, store, when
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.words import block_codes, block_words, fields

PLAIN_WARPS = 4
PLAIN_TOKENS = 4
FLOATS = ("float32", "float16")

Expr = Any


def _accepts(case: Case, target: Target) -> Refusal | None:
    """Refuses what no kernel of this file implements."""
    for what, dtype in (("activations", case.dtype), ("outputs", case.get("out_dtype", case.dtype))):
        if dtype not in FLOATS:
            return Refusal(f"needs float32 or float16 {what}, not {dtype}")
    try:
        grouping_of(case)
    except ValueError as error:
        return Refusal(str(error))
    return None


def _accepts_plain(case: Case, target: Target) -> Refusal | None:
    refusal = _accepts(case, target)
    if refusal is None and fragments.why_not(grouping_of(case)) is None:
        refusal = Refusal("is for weights whose shape does not fit in tiles")
    return refusal


def _accepts_tiles(case: Case, target: Target) -> Refusal | None:
    refusal = _accepts_plain(case, target)
    if refusal is not None:
        return refusal
    grouping = grouping_of(case)
    reason = mma_linear.why_not(case["bits"], case["in_features"], grouping.group_size, grouping.groups, case.dtype)
    return Refusal(reason) if reason else None


def _accepts_decode(case: Case, target: Target) -> Refusal | None:
    if case.rows is None or case.rows > mma_linear.TOKENS:
        return Refusal(f"is for 1 to {mma_linear.TOKENS} rows known at compile time, not {case.rows or 'symbolic'}")
    return _accepts_tiles(case, target)


def _tensors(f: Function, case: Case, target: Target) -> tuple[mma_linear.Weights, mma_linear.Problem]:
    """Declares the parameters in the contract's order."""
    grouping = grouping_of(case)
    n, k = case["out_features"], case["in_features"]
    rows = f.symbol() if case.rows is None else case.rows
    x = f.tensor("x", (rows, k), case.dtype)
    packed = {
        name: f.tensor(name, shape, dtype) for name, (shape, dtype) in layout_for(case, target).tensors(case).items()
    }
    bias = f.tensor("bias", (n,), case.dtype) if case["has_bias"] else None
    out_dtype = case.get("out_dtype", case.dtype)
    out = f.tensor("out", (rows, n), out_dtype)
    weights = mma_linear.Weights(
        words=packed["qweight"], bits=grouping.bits, out_features=n, in_features=k, group_size=grouping.group_size,
        groups=grouping.groups, scales=packed["scales"], zeros=packed.get("zeros"),
    )  # fmt: skip
    return weights, mma_linear.Problem(x, bias, out, rows, out_dtype)


def _decode(case: Case, target: Target) -> Any:
    """Builds the kernel for 1 to 8 rows."""
    with Function("quant_linear") as f:
        mma_linear.decode(*_tensors(f, case, target))
    return f.result()


def _tiles(case: Case, target: Target) -> Any:
    """Builds the tensor-core kernel for any number of rows."""
    with Function("quant_linear") as f:
        mma_linear.tiles(*_tensors(f, case, target))
    return f.result()


def _plain(case: Case, target: Target) -> Any:
    """Builds the kernel without tensor cores: a warp per weight row and up to four token rows."""
    ir = script()
    grouping = grouping_of(case)
    bits = grouping.bits
    blocks = -(-grouping.group_size // block_codes(bits))
    total = grouping.row_words // block_words(bits)
    with Function("quant_linear") as f:
        w, p = _tensors(f, case, target)
        with (
            ir.launch_thread("blockIdx.x", -(-w.out_features // PLAIN_WARPS)) as block,
            ir.launch_thread("blockIdx.y", ir.cast((p.rows + PLAIN_TOKENS - 1) // PLAIN_TOKENS, "int32")) as tile,
            ir.launch_thread("threadIdx.x", 32 * PLAIN_WARPS) as thread,
        ):
            row, lane = block * PLAIN_WARPS + thread // 32, thread % 32
            safe = ir.min(row, w.out_features - 1)
            sums = local(PLAIN_TOKENS)
            weight = local(1)
            for t in range(PLAIN_TOKENS):
                store(sums, (t,), ir.float32(0))
            with ir.serial(-(-total // 32)) as i:
                index = i * 32 + lane
                with when(index < total):
                    group = index // blocks
                    offset = index % blocks * block_codes(bits)
                    zero = ir.int32(1 << (bits - 1)) if w.zeros is None else ir.cast(w.zeros[safe, group], "int32")
                    scale = ir.cast(w.scales[safe, group], "float32")
                    for j, parts in enumerate(fields(bits)):
                        k = group * grouping.group_size + offset + j
                        with when(ir.And(offset + j < grouping.group_size, k < w.in_features)):
                            code = ir.int32(0)
                            for part in parts:
                                word = w.words[safe, index * block_words(bits) + part.word]
                                field = (word >> ir.uint32(part.shift)) & ir.uint32((1 << part.width) - 1)
                                code = code + (ir.cast(field, "int32") << ir.int32(part.low))
                            store(weight, (0,), scale * ir.cast(code - zero, "float32"))
                            for t in range(PLAIN_TOKENS):
                                token = ir.min(tile * PLAIN_TOKENS + t, p.rows - 1)
                                value = ir.cast(p.x[token, k], "float32")
                                store(sums, (t,), sums[t] + weight[0] * value)
            finish(w, p, sums, row, tile, lane)
    return f.result()


def finish(w: mma_linear.Weights, p: mma_linear.Problem, sums: Any, row: Expr, tile: Expr, lane: Expr) -> None:
    """Emits the sums over lanes and the stores of PLAIN_TOKENS tokens."""
    ir = script()
    for t in range(PLAIN_TOKENS):
        store(sums, (t,), warp_sum(sums[t]))
    for t in range(PLAIN_TOKENS):
        token = tile * PLAIN_TOKENS + t
        with when(ir.And(lane == 0, ir.And(token < p.rows, row < w.out_features))):
            value = sums[t]
            if p.bias is not None:
                value = value + ir.cast(p.bias[row], "float32")
            store(p.out, (token, row), ir.cast(value, p.out_dtype))


def _first(accepts: Callable[[Case, Target], Refusal | None]) -> Callable[[Case, Target], Refusal | None]:
    """Returns `accepts` after the checks that all kernels share."""
    return lambda case, target: _accepts(case, target) or accepts(case, target)


KERNELS = (
    Kernel("cuda.fused_linear.stationary", "fused_linear", _first(stationary_linear.accepts), stationary_linear.build),
    Kernel("cuda.fused_linear.resident", "fused_linear", _first(resident_linear.accepts), resident_linear.build),
    Kernel("cuda.fused_linear.stream", "fused_linear", _first(tile_linear.accepts_fused), tile_linear.build_stream),
    Kernel("cuda.fused_linear.wgmma", "fused_linear", _first(wgmma_linear.accepts), wgmma_linear.build),
    Kernel("cuda.quant_linear.stationary", "quant_linear", _first(stationary_linear.accepts), stationary_linear.build),
    Kernel("cuda.quant_linear.resident", "quant_linear", _first(resident_linear.accepts), resident_linear.build),
    Kernel("cuda.quant_linear.stream", "quant_linear", _first(tile_linear.accepts_stream), tile_linear.build_stream),
    Kernel("cuda.quant_linear.wgmma", "quant_linear", _first(wgmma_linear.accepts), wgmma_linear.build),
    Kernel("cuda.quant_linear.pipeline", "quant_linear", _first(pipeline_linear.accepts), pipeline_linear.build),
    Kernel("cuda.quant_linear.plain_tiles", "quant_linear", _first(tile_linear.accepts_plain), tile_linear.build_plain),
    Kernel("cuda.quant_linear.decode_mma", "quant_linear", _accepts_decode, _decode),
    Kernel("cuda.quant_linear.tiles_mma", "quant_linear", _accepts_tiles, _tiles),
    Kernel("cuda.quant_linear.plain", "quant_linear", _accepts_plain, _plain),
)
