# SPDX-License-Identifier: Apache-2.0
"""The pipeline, readable as one list: which passes run, in which order, and why."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gptq_compile.kernels.target import Target
from gptq_compile.passes.manager import Pass


def trace_passes() -> list[Pass]:
    """From what was traced to named ops: afterwards only attention looks at more than one token."""
    from gptq_compile.passes.normalize import Normalize
    from gptq_compile.passes.raise_attention import RaiseAttention
    from gptq_compile.passes.raise_ops import RaiseOps
    from gptq_compile.passes.raise_positions import RaisePositions

    return [Normalize(), RaiseAttention(), RaisePositions(), RaiseOps(), Normalize()]


def storing_passes(target: Target, dtype: str, head: int, device: str = "cpu") -> list[Pass]:
    """What else a compiled model stores otherwise than it came: a head of ``head`` bits, and matrices in float16."""
    from gptq_compile.passes.round_head import RoundHead
    from gptq_compile.passes.store_half import StoreHalf

    passes: list[Pass] = [RoundHead(head, device)] if head else []
    return [*passes, StoreHalf()] if target.kind == "cpu" and dtype == "float32" else passes


def lowering_passes(target: Target, dtype: str, device: str = "cpu", cache: str | None = None) -> Sequence[Pass]:
    """From a quantized program to the one that kernels are chosen for; torch packs weights on ``device``.

    ``cache`` is the KV cache's type, by default that of the activations.
    """
    from gptq_compile.passes.insert_kv_cache import InsertKvCache
    from gptq_compile.passes.pack_weights import PackWeights

    passes: list[Pass] = [InsertKvCache()]
    if dtype != "float32":
        from gptq_compile.passes.lower_precision import LowerPrecision

        passes.append(LowerPrecision(getattr(torch, dtype)))
    if cache not in (None, dtype):
        from gptq_compile.passes.narrow_cache import NarrowCache

        passes.append(NarrowCache(cache))
    if target.kind == "cuda":  # a launch costs more than reading stretches; on a CPU it is the other way round
        from gptq_compile.passes.fuse_linears import FuseLinears

        passes.append(FuseLinears())
    return [*passes, PackWeights(target, device)]
