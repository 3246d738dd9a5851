# SPDX-License-Identifier: Apache-2.0
"""Runs a program, or a stretch of it, on the eager reference of its ops."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from gptq_compile.passes.program import Program


class Interpreter:
    """Evaluates nodes in order, loading a parameter at its first use and dropping every value after its last.

    Args:
        program: what to run.
        device: where values live.
        dtype: floating parameters are converted to it (None leaves them as stored).
    """

    def __init__(self, program: Program, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> None:
        self.program = program
        self.device = torch.device(device)
        self.dtype = dtype

    def param(self, node: fx.Node) -> Tensor:
        """Loads the parameter of a placeholder onto the device."""
        tensor = self.program.params.get(node.meta["param"])
        dtype = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.to(self.device, dtype)

    def run(
        self, env: dict[fx.Node, Any], want: Iterable[fx.Node], nodes: Iterable[fx.Node] | None = None
    ) -> dict[fx.Node, Any]:
        """Evaluates ``nodes`` (default: the whole graph) and returns the values of ``want``.

        Args:
            env: values known at the start (user inputs, or values live across a cut); it is not changed.
            want: nodes whose values to return; each is in ``env`` or computed.
            nodes: the stretch to evaluate, in graph order.
        """
        env = dict(env)
        want = list(want)
        todo = [n for n in (self.program.graph.nodes if nodes is None else nodes) if n.op == "call_function"]
        last_use: dict[fx.Node, fx.Node] = {}
        for node in todo:
            for arg in node.all_input_nodes:
                last_use[arg] = node
        keep = set(want)
        for node in todo:
            for arg in node.all_input_nodes:
                if arg not in env and "param" in arg.meta:
                    env[arg] = self.param(arg)
            lookup = env.__getitem__
            env[node] = node.target(  # type: ignore[operator]
                *fx.node.map_arg(node.args, lookup), **self._kwargs(fx.node.map_arg(node.kwargs, lookup))
            )
            for arg in node.all_input_nodes:
                if last_use[arg] is node and arg not in keep:
                    env.pop(arg, None)
        for node in want:
            if node not in env and "param" in node.meta:
                env[node] = self.param(node)
        return {node: env[node] for node in want}

    def _kwargs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        # The trace ran on the meta device, so tensor factories in the graph ask for it; values live on ours.
        if "device" in kwargs and kwargs["device"] is not None:
            kwargs = {**kwargs, "device": self.device}
        return kwargs
