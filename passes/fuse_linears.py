# SPDX-License-Identifier: Apache-2.0
"""``fuse_linears``: linears that read the same value become one, and what read them reads stretches of its result.

So q, k and v are one product, and gate and up. Weights lie one below the other: codes, scales, zero points and biases
of quantized linears, or the matrices of others. Only linears of one grid (bits, group size, zero points, column order)
and with or without bias alike are put together, and matrices that nothing else reads.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from gptq_compile.passes.common import Node, dtype, is_call, is_param
from gptq_compile.passes.manager import Pass
from gptq_compile.passes.program import ParamStore, Program

ops = torch.ops.gptq_compile
aten = torch.ops.aten


class FuseLinears(Pass):
    """See the module's rules."""

    name = "fuse_linears"
    tolerance = 1e-6  # sums of a wider product may round differently

    def run(self, program: Program) -> bool:
        found: dict[Any, list[Node]] = {}
        for node in program.graph.nodes:
            key = _key(program, node)
            if key is not None:
                found.setdefault(key, []).append(node)
        groups = [nodes for nodes in found.values() if len(nodes) > 1]
        for nodes in groups:
            _fuse(program, nodes)
        for node in reversed(list(program.graph.nodes)) if groups else ():
            if node.op == "placeholder" and "param" in node.meta and not node.users:
                program.graph.erase_node(node)
        return bool(groups)


def _key(program: Program, node: Node) -> Any:
    """What linears must have in common; None for everything that is not to be put together."""
    if is_call(node, ops.quant_linear.default):
        x, codes, _, zeros, g_idx, bias, bits, group = node.args
        order = None if g_idx is None else tuple(program.params.get(g_idx.meta["param"]).tolist())
        return x, bits, group, zeros is None, bias is None, order, _alone(codes)
    if is_call(node, aten.linear.default) and is_param(node.args[1]):
        x, weight, bias = _linear_args(node)
        return (x, weight.meta["val"].dtype, bias is None) if _alone(weight) else None
    return None


def _alone(weight: Node) -> bool:
    return len(weight.users) == 1


def _linear_args(node: Node) -> tuple[Node, Node, Node | None]:
    x, weight, *rest = node.args
    return x, weight, rest[0] if rest else node.kwargs.get("bias")


def _fuse(program: Program, nodes: list[Node]) -> None:
    first = nodes[0]
    x = first.args[0]
    with program.graph.inserting_before(first):
        if is_call(first, ops.quant_linear.default):
            bits, group = first.args[6:8]
            stacked = [_stack(program, [n.args[i] for n in nodes]) for i in (1, 2, 3)]
            arguments = (x, *stacked, first.args[4], _stack(program, [n.args[5] for n in nodes]), bits, group)
            fused = program.call(first.target, arguments, like=first)
        else:
            _, weights, biases = zip(*(_linear_args(n) for n in nodes), strict=True)
            bias = _stack(program, list(biases))
            extra = () if bias is None else (bias,)
            fused = program.call(first.target, (x, _stack(program, list(weights)), *extra), like=first)
        wide = [_widened(node) for node in nodes]
        if any(wide):  # one cast of all, which a kernel that stores its float32 sums saves
            fused = program.call(aten._to_copy.default, (fused,), {"dtype": torch.float32}, like=first)
        pieces, start = [], 0
        for node, cast in zip(nodes, wide, strict=True):
            stop = start + int(node.meta["val"].shape[-1])
            axis = node.meta["val"].dim() - 1
            piece = program.call(aten.slice.Tensor, (fused, axis, start, stop), like=node)
            if any(wide) and cast is None:
                piece = program.call(aten._to_copy.default, (piece,), {"dtype": dtype(node)}, like=node)
            pieces.append(piece)
            start = stop
    for node, cast, piece in zip(nodes, wide, pieces, strict=True):
        replaced = node if cast is None else cast
        replaced.replace_all_uses_with(piece)
        program.graph.erase_node(replaced)
        if cast is not None:
            program.graph.erase_node(node)


def _widened(node: Node) -> Node | None:
    """The cast to float32 that is all that reads a product in half precision."""
    users = list(node.users)
    alone = len(users) == 1 and is_call(users[0], aten._to_copy.default) and dtype(users[0]) == torch.float32
    return users[0] if alone else None


def _stack(program: Program, parts: list[Node | None]) -> Node | None:
    """A parameter whose rows are those of all parts, put together when it is read; None if there are none."""
    names = [part.meta["param"] for part in parts if part is not None]
    if not names:
        return None
    params = program.params
    name = joined_name(names)
    shapes = [params.shape(n) for n in names]
    shape = (sum(s[0] for s in shapes), *shapes[0][1:])
    params.add(name, shape, params.dtype(names[0]), functools.partial(_read, params, names))
    return program._placeholder(name)


def _read(params: ParamStore, names: list[str]) -> Tensor:
    return torch.cat([params.get(name) for name in names])


def joined_name(names: list[str]) -> str:
    """One name for several: parts that differ are joined with a plus sign.

    >>> joined_name(["layers.0.q_proj.weight", "layers.0.k_proj.weight"])
    'layers.0.q_proj+k_proj.weight'
    """
    parts = [name.split(".") for name in names]
    if len({len(p) for p in parts}) > 1:
        return "+".join(names)
    return ".".join(p[0] if len(set(p)) == 1 else "+".join(p) for p in zip(*parts, strict=True))
