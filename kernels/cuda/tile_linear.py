# SPDX-License-Identifier: Apache-2.0
"""PrimFuncs of the kernels over `FragmentTiles`: TVM declares, launches and packages, CUDA text does the work."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

from gptq_compile.kernels import fragments
from gptq_compile.kernels.cuda import launch, stream, stream_input, tile_source, wgmma
from gptq_compile.kernels.cuda.stream_input import Input
from gptq_compile.kernels.cuda.warp import address, warp_sum
from gptq_compile.kernels.layouts import NATURAL_TILES, grouping_of, layout_for
from gptq_compile.kernels.registry import Case, Refusal
from gptq_compile.kernels.script import Function, local, script, store, when
from gptq_compile.kernels.target import Target

PLAIN_WARPS = 4
PLAIN_TOKENS = 4
C_TYPES = stream_input.C_TYPES
MOST_MADE = {
    stream_input.PLAIN: 1 << 30, stream_input.RMS_NORM: 1 << 15, stream_input.LAYER_NORM: 1 << 15,
    stream_input.GATED: 1 << 15, stream_input.ACTIVATED: 1 << 16,
}  # fmt: skip
"""Activations that every block may make for itself, by kind of input."""

Expr = Any


def _why_not_tiles(case: Case) -> str | None:
    reason = fragments.why_not(grouping_of(case))
    return f"is for whole tiles and {reason}" if reason else None


def accepts_plain(case: Case, target: Target) -> Refusal | None:
    """Refuses cases in another layout."""
    reason = _why_not_tiles(case)
    return Refusal(reason) if reason else None


def accepts_half(case: Case, target: Target) -> Refusal | None:
    """Refuses cases in another layout and activations that tensor cores do not multiply here."""
    reason = _why_not_tiles(case)
    if reason is None and case.dtype != "float16":
        reason = f"needs float16 activations, not {case.dtype}"
    return Refusal(reason) if reason else None


def accepts_stream(case: Case, target: Target) -> Refusal | None:
    """Refuses other layouts and types, many or symbolic rows, and activations beyond shared memory."""
    refusal = accepts_half(case, target)
    if refusal is not None:
        return refusal
    if case.rows is None or case.rows > stream.MAX_ROWS:
        return Refusal(f"is for 1 to {stream.MAX_ROWS} rows known at compile time, not {case.rows or 'symbolic'}")
    if case.rows > wgmma.STREAM_ROWS and layout_for(case, target) == NATURAL_TILES:
        return Refusal(f"is slower than wgmma from {wgmma.STREAM_ROWS + 1} rows on")
    shape = shape_of(case)
    config = stream.choose(shape, target.archs)
    if config is None:
        return Refusal(f"{case.rows} rows of {case['in_features']} do not fit in shared memory beside the weights")
    if case.rows > 4 and config.tiles * config.splits < 8 and shape.row_tiles >= 4 * stream.BLOCKS:
        return Refusal(f"{case.rows} rows of {case['in_features']} leave shared memory for few warps")
    return None


def accepts_fused(case: Case, target: Target) -> Refusal | None:
    """Refuses what `accepts_stream` does, and activations that are cheaper to make once than in every block."""
    refusal = accepts_stream(case, target)
    if refusal is not None:
        return refusal
    if case.get("out_act") and (case.rows or 0) > stream.DIGIT_ROWS:
        return Refusal(f"gates the results of at most {stream.DIGIT_ROWS} rows")
    refusal = _refuse_gates(case)
    if refusal is not None:
        return refusal
    made = _input(case)
    if made.dtype not in stream_input.C_TYPES:
        return Refusal(f"needs float32 or float16 activations, not {made.dtype}")
    if any(size % 8 for size in (made.width, made.at, made.up_width, made.up_at)):
        return Refusal("reads activations in eights, which those that lie in a wider tensor do not begin at")
    most = MOST_MADE[made.kind]
    count = (case.rows or 0) * case["in_features"]
    if count > most:
        return Refusal(f"{count} activations are cheaper to make once than in every block (from {most} on)")
    return None


def refuse_made(case: Case) -> Refusal | None:
    """Refuses activations that are to be made on the way in, and gates that are not whole tiles."""
    if case.get("input", stream_input.PLAIN) != stream_input.PLAIN:
        return Refusal("multiplies activations that are there, and makes none")
    return _refuse_gates(case)


def _refuse_gates(case: Case) -> Refusal | None:
    if case.get("out_act") and case["out_features"] % (2 * fragments.TILE_ROWS):
        return Refusal(f"needs gates that are whole tiles, not {case['out_features'] // 2} rows")
    return None


def _input(case: Case) -> Input:
    """Returns how the activations of a ``fused_linear`` case are made; those of a ``quant_linear`` are a tensor."""
    kind = str(case.get("input", stream_input.PLAIN))
    k = int(case["in_features"])
    return Input(
        kind,
        str(case.get("input_dtype", case.dtype)),
        eps=float(case.get("eps", 0.0)),
        offset=float(case.get("weight_offset", 0.0)),
        has_weight=bool(case.get("has_norm_weight", False)),
        has_bias=bool(case.get("has_norm_bias", False)),
        act=str(case.get("act", "")),
        width=int(case.get("width", k)),
        at=int(case.get("at", 0)),
        up_width=int(case.get("up_width", k)),
        up_at=int(case.get("up_at", 0)),
    )


def shape_of(case: Case, dependent: bool = False) -> stream.Shape:
    """Returns the problem of a ``quant_linear`` or ``fused_linear`` case, with 0 for a symbolic number of rows."""
    return stream.Shape(
        case.rows or 0, case["out_features"], grouping_of(case), bool(case["has_zeros"]), _input(case), dependent,
        str(case.get("out_act", "")),
    )  # fmt: skip


def _inputs(f: Function, case: Case, rows: Expr) -> dict[str, Any]:
    """Declares the tensors that the activations are made of."""
    made, k = _input(case), case["in_features"]
    widths = {"x": made.width, "up": made.up_width}
    found = {}
    for name, _ in made.parameters:
        wide = name in widths
        found[name] = f.tensor(name, (rows, widths[name]) if wide else (k,), made.dtype if wide else "float32")
    return found


def tensors_of(f: Function, case: Case, target: Target) -> dict[str, Any]:
    """Declares the parameters in the contract's order."""
    n = case["out_features"]
    rows = f.symbol() if case.rows is None else case.rows
    found = _inputs(f, case, rows)
    for name, (shape, dtype) in layout_for(case, target).tensors(case).items():
        found[name] = f.tensor(name, shape, dtype)
    if case["has_bias"]:
        found["bias"] = f.tensor("bias", (n,), case.dtype)
    if case.get("has_residual"):
        found["residual"] = f.tensor("residual", (rows, n), "float32")
    found["out"] = f.tensor("out", (rows, n // 2 if case.get("out_act") else n), case.get("out_dtype", case.dtype))
    return found


def name_of(kind: str, case: Case, *more: object) -> str:
    """Returns a name of its own for the text of a case: kernels of one module share a source file."""
    return f"gq_{kind}_{zlib.crc32(repr((case, *more)).encode()):08x}"


def run(name: str, source: str, tensors: dict[str, Any], *more: Expr) -> None:
    """Emits the call of ``name::run`` with the addresses of the tensors and more arguments."""
    ir = script()
    pointers = [tensor.access_ptr("w" if key == "out" else "r") for key, tensor in tensors.items()]
    ir.evaluate(ir.cuda.func_call(f"{name}::run", *pointers, *more, source_code=source, return_type="void"))


def build_stream(case: Case, target: Target, config: stream.Config | None = None) -> Any:
    """Builds the kernel for few rows known at compile time, divided as `config` says or as `stream.choose` does.

    For a ``fused_linear`` case the activations are made on the way in, and a residual is added on the way out.
    """
    ir = script()
    shape = shape_of(case, launch.supported(target))
    config = config or stream.choose(shape, target.archs)
    assert config is not None
    name = name_of("stream", case, target, config)
    out_type = C_TYPES[case.get("out_dtype", case.dtype)]
    natural = layout_for(case, target) == NATURAL_TILES
    source = stream.source(
        name, shape, config, bool(case["has_bias"]), out_type, bool(case.get("has_residual")), natural
    )
    supers = -(-shape.row_tiles // config.height)
    blocks = min(stream.BLOCKS, -(-supers // config.tiles))
    with Function(case.op) as f:
        tensors = tensors_of(f, case, target)
        with (
            ir.launch_thread("blockIdx.x", blocks),
            ir.launch_thread("threadIdx.x", 32 * config.tiles * config.splits),
            ir.attr(0, launch.MIN_BLOCKS, 1),
        ):
            shared = ir.alloc_buffer((stream.launch_bytes(shape, config, target.archs),), "uint8", scope="shared.dyn")
            run(name, source, tensors, shared.access_ptr("rw"))
    return launch.dependent(f.result()) if shape.dependent else f.result()


def by_rows(plan: Sequence[tuple[int | None, Any]], rows: Expr, start: Callable[[Any], None]) -> None:
    """Emits the launch of the first config of `plan` that is for so many rows: (at most how many or None, config)."""
    ir = script()
    (most, config), *rest = plan
    if most is None or not rest:
        start(config)
        return
    with ir.If(rows <= most):
        with ir.Then():
            start(config)
        with ir.Else():
            by_rows(rest, rows, start)


def build_plain(case: Case, target: Target) -> Any:
    """Builds the kernel without tensor cores: a warp per weight row and up to four token rows, lanes over k."""
    ir = script()
    grouping = grouping_of(case)
    bits, k_total = grouping.bits, grouping.in_features
    with Function("quant_linear") as f:
        t = tensors_of(f, case, target)
        rows = t["x"].shape[0]
        out_dtype = case.get("out_dtype", case.dtype)
        with (
            ir.launch_thread("blockIdx.x", -(-case["out_features"] // PLAIN_WARPS)) as block,
            ir.launch_thread("blockIdx.y", ir.cast((rows + PLAIN_TOKENS - 1) // PLAIN_TOKENS, "int32")) as part,
            ir.launch_thread("threadIdx.x", 32 * PLAIN_WARPS) as thread,
        ):
            row, lane = block * PLAIN_WARPS + thread // 32, thread % 32
            safe = ir.min(row, case["out_features"] - 1)
            tile, place = safe // fragments.TILE_ROWS, safe % fragments.TILE_ROWS
            sums, weight = local(PLAIN_TOKENS), local(1)
            for i in range(PLAIN_TOKENS):
                store(sums, (i,), ir.float32(0))
            with ir.serial((k_total + 31 - lane) // 32) as step:
                k = step * 32 + lane
                group = k // grouping.group_size
                words = address(t["qweight"], tile, k // fragments.TILE_CODES, 0)
                lookup = tile_source.code_lookup(bits, layout_for(case, target) == NATURAL_TILES)
                code = ir.cuda.func_call(
                    f"gq_code{bits}", words, place, k % fragments.TILE_CODES, source_code=lookup, return_type="int32"
                )
                zero = ir.int32(1 << (bits - 1))
                if "zeros" in t:
                    zero = ir.cast(t["zeros"][tile, group, place % 8, place // 8], "int32")
                scale = ir.cast(t["scales"][tile, group, place % 8, place // 8], "float32")
                store(weight, (0,), scale * ir.cast(code - zero, "float32"))
                for i in range(PLAIN_TOKENS):
                    token = ir.min(part * PLAIN_TOKENS + i, rows - 1)
                    store(sums, (i,), sums[i] + weight[0] * ir.cast(t["x"][token, k], "float32"))
            for i in range(PLAIN_TOKENS):
                store(sums, (i,), warp_sum(sums[i]))
            for i in range(PLAIN_TOKENS):
                token = part * PLAIN_TOKENS + i
                with when(ir.And(lane == 0, ir.And(token < rows, row < case["out_features"]))):
                    value = sums[i]
                    if "bias" in t:
                        value = value + ir.cast(t["bias"][row], "float32")
                    store(t["out"], (token, row), ir.cast(value, out_dtype))
    return f.result()
