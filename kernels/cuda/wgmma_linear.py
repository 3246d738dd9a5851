# SPDX-License-Identifier: Apache-2.0
"""PrimFuncs of `wgmma`: one kernel, or for a symbolic number of rows several and the choice between them."""

from __future__ import annotations

import contextlib
from typing import Any

from gptq_compile.kernels.cuda import tile_linear, wgmma, wgmma_choice
from gptq_compile.kernels.layouts import NATURAL_TILES, layout_for
from gptq_compile.kernels.registry import Case, Refusal
from gptq_compile.kernels.script import Function, script
from gptq_compile.kernels.target import Target


def accepts(case: Case, target: Target) -> Refusal | None:
    """Refuses other layouts and activations that tensor cores do not multiply here."""
    if layout_for(case, target) != NATURAL_TILES:
        return Refusal("is for whole tiles on a target of sm_90a alone")
    if case.dtype != "float16":
        return Refusal(f"needs float16 activations, not {case.dtype}")
    return tile_linear.refuse_made(case)


def build(case: Case, target: Target, plan: wgmma.Plan | None = None) -> Any:
    """Builds the kernels of `plan`, or of `wgmma_choice.choose`."""
    ir = script()
    shape = tile_linear.shape_of(case)
    out_type = tile_linear.C_TYPES[case.get("out_dtype", case.dtype)]
    plan = plan or wgmma_choice.choose(shape)
    with Function(case.op) as f:
        tensors = tile_linear.tensors_of(f, case, target)
        rows = tensors["x"].shape[0]

        def launch(config: wgmma.Config) -> None:
            name = tile_linear.name_of("wgmma", case, config)
            source = wgmma.source(name, shape, config, bool(case["has_bias"]), out_type, bool(case.get("has_residual")))
            token_tiles = ir.cast((rows + config.tokens - 1) // config.tokens, "int32")
            with contextlib.ExitStack() as stack:
                blocks = wgmma.blocks_along_rows(shape, config) * config.splits
                stack.enter_context(ir.launch_thread("blockIdx.x", token_tiles * blocks))
                if config.splits > 1:
                    stack.enter_context(ir.launch_thread("clusterCtaIdx.x", config.splits))
                stack.enter_context(ir.launch_thread("threadIdx.x", config.threads))
                # ptxas knows how many registers a thread starts with only if it is told how many blocks there are.
                stack.enter_context(ir.attr(ir.int32(0), "tirx.launch_bounds_min_blocks_per_sm", 1))
                shared = ir.alloc_buffer((wgmma.shared_bytes(shape, config),), "uint8", scope="shared.dyn")
                tile_linear.run(name, source, tensors, ir.cast(rows, "int32"), shared.access_ptr("rw"))

        tile_linear.by_rows(plan, rows, launch)
    return f.result()
