# SPDX-License-Identifier: Apache-2.0
"""PrimFuncs of `stationary`."""

from __future__ import annotations

from typing import Any

from gptq_compile.kernels.cuda import launch, stationary, tile_linear
from gptq_compile.kernels.layouts import NATURAL_TILES, layout_for
from gptq_compile.kernels.registry import Case, Refusal
from gptq_compile.kernels.script import Function, script
from gptq_compile.kernels.target import Target


def accepts_some_rows(case: Case, target: Target) -> Refusal | None:
    """Refuses other layouts and types, few, many or symbolic rows, and activations to be made."""
    refusal = tile_linear.accepts_half(case, target)
    if refusal is not None:
        return refusal
    if case.rows is None or case.rows > stationary.MAX_ROWS:
        return Refusal(f"is for 1 to {stationary.MAX_ROWS} rows known at compile time, not {case.rows or 'symbolic'}")
    few = stationary.rows_of_stream(case["in_features"], case["bits"])
    if case.rows <= few:
        return Refusal(f"is slower than stream up to {few} rows of {case['in_features']}")
    return tile_linear.refuse_made(case)


def accepts(case: Case, target: Target) -> Refusal | None:
    """Refuses what `accepts_some_rows` does, and long K."""
    refusal = accepts_some_rows(case, target)
    if refusal is not None:
        return refusal
    shape = tile_linear.shape_of(case)
    if stationary.choose(shape, target.archs) is None:
        return Refusal(f"{case.rows} rows of {case['in_features']} are more than the registers of a block hold")
    return None


def build(case: Case, target: Target, config: stationary.Config | None = None) -> Any:
    """Builds the kernel, divided as `config` says or as `stationary.choose` does."""
    ir = script()
    shape = tile_linear.shape_of(case, launch.supported(target))
    config = config or stationary.choose(shape, target.archs)
    assert config is not None
    name = tile_linear.name_of("stationary", case, target, config)
    out_type = tile_linear.C_TYPES[case.get("out_dtype", case.dtype)]
    natural = layout_for(case, target) == NATURAL_TILES
    text = stationary.source(
        name, shape, config, bool(case["has_bias"]), out_type, bool(case.get("has_residual")), natural
    )
    with Function(case.op) as f:
        tensors = tile_linear.tensors_of(f, case, target)
        with (
            ir.launch_thread("blockIdx.x", stationary.blocks(shape)),
            ir.launch_thread("threadIdx.x", 32 * config.warps),
            ir.attr(0, launch.MIN_BLOCKS, 1),
        ):
            shared = ir.alloc_buffer(
                (stationary.launch_bytes(shape, config, target.archs),), "uint8", scope="shared.dyn"
            )
            tile_linear.run(name, text, tensors, shared.access_ptr("rw"))
    return launch.dependent(f.result()) if shape.dependent else f.result()
