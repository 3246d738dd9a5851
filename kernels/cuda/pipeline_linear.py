# SPDX-License-Identifier: Apache-2.0
"""PrimFuncs of `pipeline`: one kernel, or for a symbolic number of rows several and the choice between them."""

from __future__ import annotations

import contextlib
from typing import Any

from gptq_compile.kernels.cuda import launch, pipeline, pipeline_choice, tile_linear
from gptq_compile.kernels.layouts import NATURAL_TILES, layout_for
from gptq_compile.kernels.registry import Case, Refusal
from gptq_compile.kernels.script import Function, script
from gptq_compile.kernels.target import Target


def _choose(case: Case, target: Target) -> pipeline_choice.Plan | None:
    natural = layout_for(case, target) == NATURAL_TILES
    shape = tile_linear.shape_of(case)
    return pipeline_choice.choose(shape, target.archs, launch.supported(target), natural)


def accepts(case: Case, target: Target) -> Refusal | None:
    """Refuses other layouts and activations that tensor cores do not multiply here."""
    refusal = tile_linear.accepts_half(case, target)
    if refusal is None and _choose(case, target) is None:
        refusal = Refusal("finds no division of the work that fits into shared memory")
    return refusal


def build(case: Case, target: Target, plan: pipeline_choice.Plan | None = None) -> Any:
    """Builds the kernels of `plan`, or of `pipeline_choice.choose`."""
    ir = script()
    shape = tile_linear.shape_of(case)
    natural = layout_for(case, target) == NATURAL_TILES
    out_type = tile_linear.C_TYPES[case.get("out_dtype", case.dtype)]
    plan = plan or _choose(case, target)
    assert plan is not None
    with Function(case.op) as f:
        tensors = tile_linear.tensors_of(f, case, target)
        rows = tensors["x"].shape[0]

        def start(config: pipeline.Config) -> None:
            name = tile_linear.name_of("pipeline", case, config, natural)
            source = pipeline.source(name, shape, config, bool(case["has_bias"]), out_type, natural)
            token_tiles = ir.cast((rows + config.tokens - 1) // config.tokens, "int32")
            with contextlib.ExitStack() as stack:
                blocks = pipeline.row_blocks(shape, config) * config.blocks
                stack.enter_context(ir.launch_thread("blockIdx.x", token_tiles * blocks))
                if config.blocks > 1:
                    stack.enter_context(ir.launch_thread("clusterCtaIdx.x", config.blocks))
                stack.enter_context(ir.launch_thread("threadIdx.x", config.threads))
                size = pipeline.shared_bytes(shape, config, natural)
                shared = ir.alloc_buffer((size,), "uint8", scope="shared.dyn")
                tile_linear.run(name, source, tensors, ir.cast(rows, "int32"), shared.access_ptr("rw"))

        tile_linear.by_rows(plan, rows, start)
    return f.result()
