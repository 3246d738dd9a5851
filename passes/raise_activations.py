# SPDX-License-Identifier: Apache-2.0
"""``raise_activations``: activations spelled by hand become their ATen op, and ``act(gate) * up`` one ``gated_act``.

1. GELU by ``tanh`` or by ``erf``, and SiLU, in any arrangement of their products and sums: the expression is expanded
   to a polynomial in ``x`` and ``t = tanh(...)`` (``erf``, ``sigmoid``) and compared with the definition.
2. ``act(gate) * up`` with ``act`` one of the dialect's activations and two tensors of one shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gptq_compile.passes.common import (
    Node,
    dtype,
    eliminate_dead,
    factors,
    is_call,
    is_node,
    is_param,
    is_tensor,
    number,
    replace,
    same_shape,
)
from gptq_compile.passes.manager import Pass
from gptq_compile.passes.program import Program

aten = torch.ops.aten
ops = torch.ops.gptq_compile

Polynomial = dict[tuple[int, int], float]  # (power of x, power of t) -> coefficient
_DEPTH = 8  # ops between x and t, or t and the result, that are searched
_TOLERANCE = 1e-6  # relative, on coefficients: models write sqrt(2 / pi) to 8 digits


@dataclass(frozen=True)
class _Definition:
    """``sum outer * x^i t^j`` with ``t = inner_op(sum inner * x^i)``."""

    inner_op: Any
    inner: Polynomial
    outer: Polynomial
    target: Any
    kwargs: tuple[tuple[str, Any], ...] = ()


_SQRT_2_PI = math.sqrt(2 / math.pi)
_DEFINITIONS = (
    _Definition(  # arXiv 1606.08415, the tanh approximation
        aten.tanh.default,
        {(1, 0): _SQRT_2_PI, (3, 0): _SQRT_2_PI * 0.044715},
        {(1, 0): 0.5, (1, 1): 0.5},
        aten.gelu.default,
        (("approximate", "tanh"),),
    ),
    _Definition(aten.erf.default, {(1, 0): math.sqrt(0.5)}, {(1, 0): 0.5, (1, 1): 0.5}, aten.gelu.default),
    _Definition(aten.sigmoid.default, {(1, 0): 1.0}, {(1, 1): 1.0}, aten.silu.default),
)
_ACTIVATIONS = {
    aten.silu.default: "silu",
    aten.relu.default: "relu",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
}


class RaiseActivations(Pass):
    """See the module's rules."""

    name = "raise_activations"

    def run(self, program: Program) -> bool:
        changed = False
        for definition in _DEFINITIONS:
            for node in program.graph.find_nodes(op="call_function", target=definition.inner_op):
                changed |= _raise_spelled(program, node, definition)
        for node in list(program.graph.nodes):
            changed |= _raise_gated(program, node)
        return eliminate_dead(program) | changed


def _raise_spelled(program: Program, t: Node, definition: _Definition) -> bool:
    for x in _within(t, lambda n: n.all_input_nodes, _DEPTH):
        if not is_tensor(x) or not same_shape(x, t) or is_param(x):
            continue
        inner = _expand(t.args[0], {x: {(1, 0): 1.0}})
        if inner is None or not _equal(inner, definition.inner):
            continue
        for root in _within(t, lambda n: list(n.users), _DEPTH):
            outer = _expand(root, {x: {(1, 0): 1.0}, t: {(0, 1): 1.0}})
            if outer is None or not _equal(outer, definition.outer):
                continue
            with program.graph.inserting_before(root):
                new = program.call(definition.target, (x,), dict(definition.kwargs), like=root)
            replace(root, new)
            return True
    return False


def _within(start: Node, neighbours: Callable[[Node], list[Node]], depth: int) -> list[Node]:
    """Nodes reached from ``start`` in at most ``depth`` steps through arithmetic, nearest first; not ``start``."""
    found: dict[Node, None] = {}
    frontier = [start]
    for _ in range(depth):
        frontier = [n for f in frontier for n in neighbours(f) if n not in found and n.op != "output"]
        found.update(dict.fromkeys(frontier))
        frontier = [n for n in frontier if is_call(n, *_ARITHMETIC)]
    return list(found)


_ARITHMETIC = (
    aten.mul.Tensor,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.div.Tensor,
    aten.neg.default,
    aten.pow.Tensor_Scalar,
    aten.square.default,
    aten.mul.Scalar,
    aten.add.Scalar,
)


def _expand(value: Any, atoms: dict[Node, Polynomial]) -> Polynomial | None:
    """The polynomial in the atoms that an expression computes, or None if it is not one (or has degree above 4)."""
    if (constant := number(value)) is not None:
        return {(0, 0): constant}
    if value in atoms:
        return atoms[value]
    if not is_call(value, *_ARITHMETIC) or value.kwargs:
        return None
    if value.target is aten.neg.default:
        return _times({(0, 0): -1.0}, _expand(value.args[0], atoms))
    if value.target is aten.square.default:
        base = _expand(value.args[0], atoms)
        return _times(base, base)
    a = _expand(value.args[0], atoms)
    if value.target is aten.pow.Tensor_Scalar:
        return {2: _times(a, a), 3: _times(_times(a, a), a)}.get(value.args[1]) if value.args[1] in (2, 3) else None
    b = _expand(value.args[1], atoms)
    if a is None or b is None:
        return None
    if value.target in (aten.mul.Tensor, aten.mul.Scalar):
        return _times(a, b)
    if value.target is aten.div.Tensor:
        divisor = number(value.args[1])
        return _times(a, {(0, 0): 1 / divisor}) if divisor else None
    sign = -1.0 if value.target is aten.sub.Tensor else 1.0
    return {k: a.get(k, 0.0) + sign * b.get(k, 0.0) for k in a.keys() | b.keys()}


def _times(a: Polynomial | None, b: Polynomial | None) -> Polynomial | None:
    if a is None or b is None:
        return None
    out: Polynomial = {}
    for (i, j), u in a.items():
        for (k, l), v in b.items():
            out[i + k, j + l] = out.get((i + k, j + l), 0.0) + u * v
    return out if all(sum(k) <= 4 for k in out) else None


def _equal(a: Polynomial, b: Polynomial) -> bool:
    return all(
        math.isclose(a.get(k, 0.0), b.get(k, 0.0), rel_tol=_TOLERANCE, abs_tol=1e-12) for k in a.keys() | b.keys()
    )


def _raise_gated(program: Program, node: Node) -> bool:
    if not is_call(node, aten.mul.Tensor) or not node.users:
        return False
    for act, up in factors(node):
        found = _activation(act)
        if found is None or not is_tensor(up) or is_param(up) or up is act:
            continue
        name, gate = found
        if not (same_shape(gate, up) and same_shape(gate, node) and dtype(gate) == dtype(up) == dtype(node)):
            continue
        if not dtype(gate).is_floating_point:
            continue
        with program.graph.inserting_before(node):
            new = program.call(ops.gated_act.default, (gate, up, name), like=node)
        replace(node, new)
        return True
    return False


def _activation(node: Any) -> tuple[str, Node] | None:
    """Name and argument of an activation whose value nothing else reads."""
    if not is_node(node) or len(node.users) != 1:
        return None
    if node.target in _ACTIVATIONS:
        return _ACTIVATIONS[node.target], node.args[0]
    if is_call(node, aten.gelu.default):
        kind = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
        return {"none": "gelu", "tanh": "gelu_tanh"}[kind], node.args[0]
    squared: Any = None
    if is_call(node, aten.square.default) or (is_call(node, aten.mul.Tensor) and node.args[0] is node.args[1]):
        squared = node.args[0]
    if is_call(squared, aten.relu.default):
        return "relu2", squared.args[0]
    return None
