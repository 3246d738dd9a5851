# SPDX-License-Identifier: Apache-2.0
"""``round_head``: an output projection that was left in floating point is rounded to codes of its own width.

On a CPU a step reads all weights once, and in a small model most of them are the head's: 113 of SmolLM2-135M's 169 MB,
in float32. In 8 bits and groups of 128 it is 29 MB, and no logit moves by more than its rounding (benchmarks/RESULTS.md
has what that does to perplexity). Codes are the nearest ones on symmetric grids: at 8 bits there is nothing for GPTQ to
gain, and no calibration is needed. A table that the head shared with the embedding stays the embedding's.
"""

from __future__ import annotations

from dataclasses import asdict

import torch

from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.rtn import rtn
from gptq_compile.passes.gptq_quantize import LinearReport, rewrite_linear, weight_name
from gptq_compile.passes.manager import Pass
from gptq_compile.passes.program import Program
from gptq_compile.passes.stages import quantizable

GROUP = 128


def head_config(bits: int, columns: int) -> QuantizeConfig:
    """How a head of so many input features is rounded."""
    return QuantizeConfig(wbits=bits, group_size=GROUP if columns >= GROUP else -1, sym=True, method="rtn")


class RoundHead(Pass):
    """See the module's text.

    Args:
        bits: 2, 3, 4 or 8. ``device``: where to round.

    Attributes:
        reports: one for each matrix that was rounded.
    """

    name = "round_head"
    preserves = False

    def __init__(self, bits: int, device: str | torch.device = "cpu") -> None:
        self.bits = bits
        self.device = torch.device(device)
        self.reports: list[LinearReport] = []

    @torch.no_grad()
    def run(self, program: Program) -> bool:
        inner = set(quantizable(program, False))
        for node in quantizable(program, True):
            if node in inner:
                continue
            weight, name = program.params.get(node.args[1].meta["param"]), weight_name(node)
            config = head_config(self.bits, weight.shape[1])
            solution = rtn(weight.to(self.device, torch.float32), config, name=name)
            self.reports.append(
                LinearReport(
                    name, (weight.shape[0], weight.shape[1]), solution.bits, solution.group_size, "rtn",
                    None, None, 0.0, 0, None, round(solution.stats.seconds, 4),
                )
            )  # fmt: skip
            rewrite_linear(program, node, solution)
        if not self.reports:
            return False
        for node in list(program.graph.nodes):
            if node.op == "placeholder" and "param" in node.meta and not node.users:
                program.graph.erase_node(node)
        program.attrs["quantization"] = [*program.attrs.get("quantization", ()), *map(asdict, self.reports)]
        return True
