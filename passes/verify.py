# SPDX-License-Identifier: Apache-2.0
"""The IR's rules, checked before and after every pass."""

from __future__ import annotations

import operator

import torch

from gptq_compile.errors import PassError
from gptq_compile.passes.dialect import NAMESPACE
from gptq_compile.passes.program import Program, where


def verify(program: Program) -> None:
    """Checks that a program is well formed.

    1. The FX graph is well formed and returns exactly one value.
    2. Every node is a placeholder, an ATen or dialect op, symbolic-shape arithmetic, or ``getitem``.
    3. Every placeholder and tensor op carries a fake value.
    4. Every parameter placeholder has a tensor of the same shape in the store.

    Raises:
        PassError: naming the node that breaks a rule.
    """
    program.graph.lint()
    outputs = [n for n in program.graph.nodes if n.op == "output"]
    if len(outputs) != 1 or len(outputs[0].args[0]) != 1:
        raise PassError("A program must return exactly one value, its logits.")
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "placeholder":
            _verify_placeholder(program, node)
        elif node.op != "call_function":
            raise PassError(f"Node {node.name} is a {node.op}, which the IR does not have.")
        elif isinstance(node.target, torch._ops.OpOverload):
            if node.target.namespace not in ("aten", "prims", NAMESPACE):
                raise PassError(f"{where(node)} is neither an ATen op nor one of ours.")
        elif node.target is not operator.getitem and getattr(node.target, "__module__", "") not in (
            "_operator", "math", "torch", "torch.fx.experimental.sym_node", "torch.utils._sympy.functions",
        ):  # fmt: skip
            raise PassError(f"{where(node)} is not an op of the IR.")
        if "val" not in node.meta and node.users:
            raise PassError(f"{where(node)} has no fake value, so its shape is unknown.")


def _verify_placeholder(program: Program, node: torch.fx.Node) -> None:
    name = node.meta.get("param")
    if name is None:
        return
    if name not in program.params:
        raise PassError(f"Parameter {name!r} is used by the graph but is not in the parameter store.")
    shape, expected = program.params.shape(name), tuple(node.meta["val"].shape)
    if shape != expected:
        raise PassError(f"Parameter {name!r} has shape {list(shape)} in the store but {list(expected)} in the graph.")
