# SPDX-License-Identifier: Apache-2.0
"""``narrow_cache``: a float32 program keeps keys and values in float16, or in int8 with scales for tokens and heads.

They are rounded once, when they are stored; attention reads them back as float32. What a step reads grows with the
context, and half or a quarter of the bytes take less time (benchmarks/RESULTS.md) and leave room for more context.
"""

from __future__ import annotations

import torch

from gptq_compile.errors import ConfigError, PassError
from gptq_compile.kernels.cache_format import row_width
from gptq_compile.passes.common import dtype, is_call
from gptq_compile.passes.manager import Pass
from gptq_compile.passes.program import Program

_TOLERANCE = {"float16": 1e-4, "int8": 3e-2}


class NarrowCache(Pass):
    """See the module's text.

    Args:
        to: ``float16`` or ``int8``.

    Raises:
        ConfigError: for any other type.
    """

    name = "narrow_cache"

    def __init__(self, to: str) -> None:
        if to not in _TOLERANCE:
            raise ConfigError(f"narrow_cache makes caches of {' or '.join(_TOLERANCE)}, not {to}.")
        self.to = to

    @property
    def tolerance(self) -> float:  # type: ignore[override]
        """Allowed NMSE of the logits: rounding to 11 or 8 bits, amplified by the depth of the model."""
        return _TOLERANCE[self.to]

    def requires(self, program: Program) -> None:
        if not any(n.name == "page_table" for n in program.inputs):
            raise PassError("The program has no cache to narrow; insert_kv_cache makes one.")

    def run(self, program: Program) -> bool:
        changed = False
        for node in program.graph.nodes:
            if not is_call(node, torch.ops.gptq_compile.paged_attention.default):
                continue
            for cache in node.args[3:5]:
                if dtype(cache) == torch.float32:
                    *shape, dim = cache.meta["val"].shape
                    with program.fake_mode:
                        kind = getattr(torch, self.to)
                        cache.meta["val"] = torch.empty((*shape, row_width(self.to, dim)), dtype=kind, device="meta")
                    changed = True
        return changed
