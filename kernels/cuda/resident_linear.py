# SPDX-License-Identifier: Apache-2.0
"""PrimFuncs of `resident`."""

from __future__ import annotations

from typing import Any

from gptq_compile.kernels.cuda import launch, resident, stationary_linear, tile_linear
from gptq_compile.kernels.layouts import NATURAL_TILES, layout_for
from gptq_compile.kernels.registry import Case, Refusal
from gptq_compile.kernels.script import Function, script
from gptq_compile.kernels.target import Target


def accepts(case: Case, target: Target) -> Refusal | None:
    """Refuses what `stationary` does for its rows, older GPUs, and what a cluster cannot hold."""
    refusal = stationary_linear.accepts_some_rows(case, target)
    if refusal is not None:
        return refusal
    if not launch.supported(target):
        return Refusal("shares K among the blocks of a cluster, from sm_90 on")
    if resident.choose(tile_linear.shape_of(case), target.archs) is None:
        return Refusal(f"{case.rows} rows of {case['in_features']} do not fit in the shared memory of a cluster")
    return None


def build(case: Case, target: Target, config: resident.Config | None = None) -> Any:
    """Builds the kernel, divided as `config` says or as `resident.choose` does."""
    ir = script()
    shape = tile_linear.shape_of(case, launch.supported(target))
    config = config or resident.choose(shape, target.archs)
    assert config is not None
    name = tile_linear.name_of("resident", case, target, config)
    out_type = tile_linear.C_TYPES[case.get("out_dtype", case.dtype)]
    natural = layout_for(case, target) == NATURAL_TILES
    text = resident.source(
        name, shape, config, bool(case["has_bias"]), out_type, bool(case.get("has_residual")), natural
    )
    with Function(case.op) as f:
        tensors = tile_linear.tensors_of(f, case, target)
        with (
            ir.launch_thread("blockIdx.x", resident.clusters(shape, config) * config.splits),
            ir.launch_thread("clusterCtaIdx.x", config.splits),
            ir.launch_thread("threadIdx.x", 32 * config.warps),
            ir.attr(0, launch.MIN_BLOCKS, 1),
        ):
            shared = ir.alloc_buffer((resident.launch_bytes(shape, config, target.archs),), "uint8", scope="shared.dyn")
            tile_linear.run(name, text, tensors, shared.access_ptr("rw"))
    return launch.dependent(f.result())
