# SPDX-License-Identifier: Apache-2.0
"""What rewrites share: looking at nodes, replacing them, and the clean-ups that let transposes meet and cancel."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import fx

from gptq_compile.passes.program import Program

aten = torch.ops.aten

Node: TypeAlias = Any
"""An ``fx.Node``. FX types a node's arguments by a union that is too wide to check anything."""

CASTS = (aten._to_copy.default, aten.to.dtype)
_END = (1 << 63) - 1


def is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


def is_call(node: Any, *targets: Any) -> bool:
    """Whether ``node`` calls one of ``targets``."""
    return is_node(node) and node.op == "call_function" and node.target in targets


def shape(node: Node) -> tuple[Any, ...]:
    """The (possibly symbolic) shape of a tensor node."""
    return tuple(node.meta["val"].shape)


def rank(node: Node) -> int:
    return len(shape(node))


def dtype(node: Node) -> torch.dtype:
    return node.meta["val"].dtype


def is_tensor(node: Any) -> bool:
    return is_node(node) and isinstance(node.meta.get("val"), torch.Tensor)


def number(value: Any) -> float | None:
    """A Python number, or None for anything else."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def is_param(node: Any) -> bool:
    return is_node(node) and "param" in node.meta


def factors(node: Any) -> Iterator[tuple[Any, Any]]:
    """The two operands of a product, in both orders; nothing if ``node`` is no product."""
    return _both_orders(node, aten.mul.Tensor)


def terms(node: Any) -> Iterator[tuple[Any, Any]]:
    """The two operands of a sum, in both orders; nothing if ``node`` is no sum, or is ``add(a, b, alpha=2)``."""
    return _both_orders(node, aten.add.Tensor)


def _both_orders(node: Any, target: Any) -> Iterator[tuple[Any, Any]]:
    if is_call(node, target) and not node.kwargs and len(node.args) == 2:
        a, b = node.args
        yield a, b
        yield b, a


def dims_arg(value: Any, of_rank: int) -> list[int] | None:
    """A ``dim`` argument as non-negative axes; None if it means all."""
    if isinstance(value, int):
        value = [value]
    return None if not value else sorted(d % of_rank for d in value)


def same_shape(a: Node, b: Node) -> bool:
    """Whether two shapes are provably equal (symbolic sizes by expression)."""
    return [str(d) for d in shape(a)] == [str(d) for d in shape(b)]


def replace(node: Node, by: Node) -> None:
    """Redirects every use of ``node`` to ``by`` and erases it."""
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def eliminate_dead(program: Program) -> bool:
    """Erases calls and parameter placeholders that nothing uses; their tensors stay in the store."""
    changed = False
    for node in reversed(list(program.graph.nodes)):
        unused = node.op == "call_function" or is_param(node)
        if unused and not node.users and not _mutates(node):
            program.graph.erase_node(node)
            changed = True
    return changed


def _mutates(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def merge_duplicates(program: Program) -> bool:
    """Common subexpressions: pure calls with equal arguments become one."""
    seen: dict[Any, Node] = {}
    changed = False
    for node in list(program.graph.nodes):
        if node.op != "call_function" or _mutates(node):
            continue
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        key = (node.target, _key(node.args), _key(node.kwargs))
        if key in seen:
            replace(node, seen[key])
            changed = True
        else:
            seen[key] = node
    return changed


def _key(value: Any) -> Any:
    if is_node(value):
        return value
    if isinstance(value, (list, tuple)):
        return ("seq", *(_key(v) for v in value))
    if isinstance(value, dict):
        return ("map", *((k, _key(v)) for k, v in sorted(value.items())))
    return (type(value).__name__, repr(value))  # 1, 1.0 and True are different arguments


def drop_identities(program: Program) -> bool:
    """``x * 1``, ``x / 1``, ``x + 0``, ``x - 0`` and ``cat`` with empty pieces become their operand."""
    changed = False
    for node in list(program.graph.nodes):
        source: Any = None
        if is_call(node, aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
            neutral = 1.0 if node.target in (aten.mul.Tensor, aten.div.Tensor) else 0.0
            if number(node.args[1]) == neutral:
                source = node.args[0]
        elif is_call(node, aten.cat.default):
            changed |= _drop_empty_pieces(node)
            if len(node.args[0]) == 1:
                source = node.args[0][0]
        if is_tensor(source) and dtype(source) == dtype(node) and same_shape(source, node):
            replace(node, source)
            changed = True
    return changed


def _drop_empty_pieces(node: Node) -> bool:
    pieces: list[Node] = list(node.args[0])
    axis = (node.args[1] if len(node.args) > 1 else 0) % rank(node)
    kept = [p for p in pieces if not (isinstance(size := shape(p)[axis], int) and size == 0)]
    if not kept or len(kept) == len(pieces):
        return False
    node.args = (kept, axis)
    return True


def swapped_axes(node: Any) -> tuple[Node, int, int] | None:
    """``(source, a, b)`` if ``node`` swaps two axes of ``source``, spelled ``transpose`` or ``permute``."""
    if is_call(node, aten.transpose.int):
        a, b = sorted(d % rank(node) for d in node.args[1:])
        return (node.args[0], a, b) if a != b else None
    if is_call(node, aten.permute.default):
        moved = [i for i, d in enumerate(node.args[1]) if d % rank(node) != i]
        return (node.args[0], moved[0], moved[1]) if len(moved) == 2 else None
    return None


def feature_slice(node: Node) -> tuple[Node, int, int, int] | None:
    """``(source, start, stop, step)`` if ``node`` is a stretch of the last axis of ``source``.

    Understands ``slice`` and the pieces of ``split``; all four are static.
    """
    if is_call(node, aten.slice.Tensor):
        defaults: list[Any] = [None, 0, None, None, 1]
        source, axis, start, stop, step = list(node.args) + defaults[len(node.args) :]
        width = shape(source)[-1]
        if axis % rank(node) != rank(node) - 1 or not isinstance(width, int):
            return None
        bounds = slice(start, None if stop in (None, _END) else stop, step)
        if any(is_node(b) for b in (start, stop, step)):
            return None
        first, last, stride = bounds.indices(width)
        return source, first, last, stride
    if is_call(node, operator.getitem) and is_call(
        node.args[0], aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default
    ):
        split, index = node.args
        source, axis = split.args[0], split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
        if axis % rank(source) != rank(source) - 1:
            return None
        sizes = [v.shape[-1] for v in split.meta["val"]]
        start = sum(sizes[:index])
        return source, start, start + sizes[index], 1
    return None


def sink_transposes(program: Program, norms: tuple[Any, ...]) -> bool:
    """Moves a swap of inner axes below ops that only look at the last axis, then cancels swaps that meet.

    ``norm(transpose(x, 1, 2))`` becomes ``transpose(norm(x), 1, 2)``, and likewise for stretches of the last axis and
    for ``cat`` along it.
    """
    changed = False
    for node in list(program.graph.nodes):
        if is_call(node, aten.cat.default):
            changed |= _sink_below_cat(program, node)
            continue
        if is_call(node, *norms):
            swap = swapped_axes(node.args[0])
        elif (piece := feature_slice(node)) is not None and shape(node)[-1] != 0:
            swap = swapped_axes(piece[0])
        else:
            continue
        if swap is None or swap[2] == rank(swap[0]) - 1:
            continue
        source, a, b = swap
        with program.graph.inserting_before(node):
            if is_call(node, operator.getitem):
                split: Any = node.args[0]
                with program.graph.inserting_before(split):
                    inner = program.call(split.target, (source, *split.args[1:]), split.kwargs, like=split)
                new = program.call(operator.getitem, (inner, node.args[1]), like=node)
            else:
                new = program.call(node.target, (source, *node.args[1:]), node.kwargs, like=node)
            back = program.call(aten.transpose.int, (new, a, b), like=node)
        replace(node, back)
        changed = True
    return cancel_transposes(program) | changed


def _sink_below_cat(program: Program, node: Node) -> bool:
    """``cat`` of equally transposed pieces along the last axis is the transpose of a ``cat``."""
    swaps = [swapped_axes(piece) for piece in node.args[0]]
    last = rank(node) - 1
    if swaps[0] is None or len(node.args) < 2 or node.args[1] % rank(node) != last or swaps[0][2] == last:
        return False
    sources = [s[0] for s in swaps if s is not None and s[1:] == swaps[0][1:]]
    if len(sources) != len(swaps):
        return False
    with program.graph.inserting_before(node):
        new = program.call(aten.cat.default, (sources, -1), like=node)
        back = program.call(aten.transpose.int, (new, *swaps[0][1:]), like=node)
    replace(node, back)
    return True


def cancel_transposes(program: Program) -> bool:
    """``transpose(transpose(x, a, b), b, a)`` becomes ``x``."""
    changed = False
    for node in list(program.graph.nodes):
        outer = swapped_axes(node)
        inner = swapped_axes(outer[0]) if outer else None
        if outer and inner and outer[1:] == inner[1:]:
            replace(node, inner[0])
            changed = True
    return changed


def with_defaults(args: Any, defaults: list[Any]) -> list[Any]:
    """Positional arguments filled up to ``len(defaults)`` with the defaults of those left out."""
    return [*args, *defaults[len(args) :]]
