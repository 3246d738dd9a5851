# SPDX-License-Identifier: Apache-2.0
"""Runs stretches of a program over all calibration sequences."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gptq_compile.passes.common import Node
from gptq_compile.passes.interpret import Interpreter
from gptq_compile.passes.program import Program

Env = dict[Node, Any]


class Runner:
    """Runs stretches of the graph for one sequence after another with their parameters loaded once."""

    def __init__(self, program: Program, device: torch.device) -> None:
        self.program = program
        self.interpreter = Interpreter(program, device, torch.float32)

    def load(self, nodes: list[Node], overrides: dict[Node, Tensor]) -> Env:
        """The parameters that ``nodes`` read; ``overrides`` replaces some."""
        needed = {a for n in nodes for a in n.all_input_nodes if "param" in a.meta}
        return {p: overrides[p] if p in overrides else self.interpreter.param(p) for p in needed}

    def run(self, state: Env, nodes: list[Node], live: Iterable[Node], loaded: Env) -> Env:
        env = {**state, **loaded}
        made = set(nodes)
        want = [n for n in live if n in made or n in state]
        return self.interpreter.run(env, want, nodes)
