# SPDX-License-Identifier: Apache-2.0
"""``raise_rotary``: ``x * cos + turned(x) * sin`` becomes ``rotary_embedding`` on token-major heads.

1. ``turned`` is ``cat(-x2, x1)`` of the two halves of the features, or ``stack(-x[1::2], x[0::2])`` flattened; the
   former may be spelled half by half: ``cat(x1*c - x2*s, x2*c + x1*s)`` with tables of half width.
2. The tables become ``[1, n, rotary_dim]``; the heads ``[1, n, heads, head_dim]`` by a transpose around, which cancels
   against the model's own.
3. When only a first stretch of the features is turned and the rest is put back behind it, the op takes the whole head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gptq_compile.passes.common import (
    Node,
    dtype,
    eliminate_dead,
    factors,
    feature_slice,
    is_call,
    is_node,
    is_tensor,
    rank,
    replace,
    same_shape,
    shape,
    swapped_axes,
    terms,
)
from gptq_compile.passes.manager import Pass
from gptq_compile.passes.program import Program

aten = torch.ops.aten
ops = torch.ops.gptq_compile


@dataclass(frozen=True)
class _Turn:
    """A match: ``x`` turned by tables of its shape's last axis.

    ``half``: the tables hold one value per pair. ``parts``: the two halves are not those of ``x`` but every other
    feature of it (DeepSeek), and have to be put side by side first.
    """

    x: Node
    cos: Node
    sin: Node
    interleaved: bool
    half: bool = False
    parts: tuple[Node, Node] | None = None


class RaiseRotary(Pass):
    """See the module's rules."""

    name = "raise_rotary"

    def run(self, program: Program) -> bool:
        changed = False
        for node in list(program.graph.nodes):
            match = _match_whole(node) or _match_halves(node)
            if match is not None:
                changed |= _rewrite(program, node, match)
        for node in list(program.graph.nodes):
            changed |= _extend_to_head(program, node)
        return eliminate_dead(program) | changed


def _match_whole(node: Node) -> _Turn | None:
    for straight, turned in terms(node):
        for x, cos in factors(straight):
            if not (is_tensor(x) and is_tensor(cos)):
                continue
            for rotated, sin in factors(turned):
                kind = _rotated_kind(rotated, x) if is_tensor(sin) else None
                if kind is not None and same_shape(node, x) and same_shape(cos, sin):
                    return _Turn(x, cos, sin, kind)
    return None


def _rotated_kind(rotated: Any, x: Node) -> bool | None:
    """False if ``rotated`` is ``x`` turned by halves, True by neighbours, None if neither."""
    width = shape(x)[-1] if rank(x) else 1
    if not isinstance(width, int) or width % 2:
        return None
    half = width // 2
    if is_call(rotated, aten.cat.default) and len(rotated.args[0]) == 2:
        axis = rotated.args[1] if len(rotated.args) > 1 else 0
        second, first = rotated.args[0]
        if axis % rank(x) == rank(x) - 1 and _stretch(first) == (x, 0, half, 1):
            return False if _negated_stretch(second) == (x, half, width, 1) else None
        return None
    if is_call(rotated, aten.reshape.default, aten.view.default, aten.flatten.using_ints):
        pairs = rotated.args[0]
        if not (is_call(pairs, aten.stack.default) and len(pairs.args[0]) == 2 and same_shape(rotated, x)):
            return None
        axis = pairs.args[1] if len(pairs.args) > 1 else 0
        odd, even = pairs.args[0]
        if axis % rank(pairs) != rank(pairs) - 1:
            return None
        if _stretch(even) == (x, 0, width, 2) and _negated_stretch(odd) == (x, 1, width, 2):
            return True
    return None


def _stretch(node: Any) -> tuple[Any, ...] | None:
    return feature_slice(node) if is_node(node) else None


def _negated_stretch(node: Any) -> tuple[Any, ...] | None:
    if is_call(node, aten.neg.default):
        return _stretch(node.args[0])
    if is_call(node, aten.mul.Tensor) and node.args[1] in (-1, -1.0):
        return _stretch(node.args[0])
    return None


def _match_halves(node: Node) -> _Turn | None:
    """``cat(x1 * c - x2 * s, x2 * c + x1 * s)``."""
    if not is_call(node, aten.cat.default) or len(node.args[0]) != 2:
        return None
    axis = node.args[1] if len(node.args) > 1 else 0
    low, high = node.args[0]
    if axis % rank(node) != rank(node) - 1 or not is_call(low, aten.sub.Tensor) or low.kwargs:
        return None
    minuend, subtrahend = low.args
    for x1, cos in factors(minuend):
        for x2, sin in factors(subtrahend):
            first, second = _stretch(x1), _stretch(x2)
            if first is None or second is None or first[0] is not second[0]:
                continue
            x, width = first[0], shape(first[0])[-1]
            halves = (first[1:], second[1:]) == ((0, width // 2, 1), (width // 2, width, 1))
            every_other = (first[1:], second[1:]) == ((0, width, 2), (1, width, 2))
            if width % 2 or not (halves or every_other):
                continue
            for a, b in terms(high):
                if _is_product(a, second, cos) and _is_product(b, first, sin) and same_shape(cos, sin):
                    return _Turn(x, cos, sin, False, half=True, parts=None if halves else (x1, x2))
    return None


def _is_product(node: Any, stretch: tuple[Any, ...], table: Node) -> bool:
    return any(_stretch(a) == stretch and b is table for a, b in factors(node))


def _rewrite(program: Program, node: Node, turn: _Turn) -> bool:
    x = turn.x
    if rank(x) != 4 or rank(turn.cos) not in (3, 4) or dtype(x) != dtype(node):
        return False
    with program.graph.inserting_before(node):
        axis = _head_axis(x, turn.cos)
        if axis is None:
            return False
        cos, sin = (_table(program, t, axis, turn.half) for t in (turn.cos, turn.sin))
        if turn.parts is not None:
            x = program.call(aten.cat.default, (list(turn.parts), -1), like=node)
        swap = swapped_axes(x)
        if axis == 2:
            new = program.call(ops.rotary_embedding.default, (x, cos, sin, turn.interleaved), like=node)
        else:
            if swap is not None and swap[1:] == (1, 2):
                heads = swap[0]
            else:
                heads = program.call(aten.transpose.int, (x, 1, 2), like=node)
            new = program.call(ops.rotary_embedding.default, (heads, cos, sin, turn.interleaved), like=node)
            new = program.call(aten.transpose.int, (new, 1, 2), like=node)
    replace(node, new)
    return True


def _head_axis(x: Node, table: Node) -> int | None:
    """1 if ``x`` is ``[1, heads, n, d]``, 2 if it is ``[1, n, heads, d]``, as the table's broadcasting tells."""
    sizes, t = shape(x), [1] * (4 - rank(table)) + list(shape(table))
    if not (isinstance(sizes[0], int) and sizes[0] == 1):
        return None
    for tokens, heads in ((2, 1), (1, 2)):
        static = isinstance(sizes[heads], int) and isinstance(t[heads], int) and t[heads] == 1
        if static and isinstance(sizes[tokens], torch.SymInt) and str(t[tokens]) == str(sizes[tokens]):
            return heads
    return None


def _table(program: Program, table: Node, head_axis: int, half: bool) -> Node:
    """A table ``[1, n, R]`` out of one that broadcasts over heads."""
    if rank(table) == 4:
        if is_call(table, aten.unsqueeze.default) and table.args[1] % 4 == head_axis:
            table = table.args[0]
        else:
            table = program.call(aten.squeeze.dim, (table, head_axis), like=table)
    # A rank 3 table broadcasts against [1, heads, n, d] from the right, so it is [1, n, R] already.
    return program.call(aten.cat.default, ([table, table], -1), like=table) if half else table


def _extend_to_head(program: Program, node: Node) -> bool:
    """``cat(rotary(x[..., :r]), x[..., r:])`` is ``rotary(x)``, with or without transposes around."""
    if not is_call(node, aten.cat.default) or len(node.args[0]) != 2:
        return False
    axis = node.args[1] if len(node.args) > 1 else 0
    turned, rest = node.args[0]
    if axis % rank(node) != rank(node) - 1:
        return False
    swap = swapped_axes(turned)
    rotary = swap[0] if swap is not None and swap[1:] == (1, 2) else turned
    if not is_call(rotary, ops.rotary_embedding.default):
        return False
    x = rotary.args[0]
    outer = swapped_axes(x) if rotary is not turned else None
    if rotary is not turned:
        # Head-major: the heads that went in were transposed from the model's slice, or hoisted above it.
        if outer is None or outer[1:] != (1, 2):
            return False
        x = outer[0]
    first, second = _stretch(x), _stretch(rest)
    if first is None or second is None or first[0] is not second[0]:
        return False
    source, width, turns = first[0], shape(first[0])[-1], shape(rotary.args[1])[-1]
    if first[1:] != (0, turns, 1) or second[1:] != (turns, width, 1):
        return False
    with program.graph.inserting_before(node):
        if rotary is turned:
            new = program.call(rotary.target, (source, *rotary.args[1:]), like=rotary)
        else:
            heads = program.call(aten.transpose.int, (source, 1, 2), like=rotary)
            new = program.call(rotary.target, (heads, *rotary.args[1:]), like=rotary)
            new = program.call(aten.transpose.int, (new, 1, 2), like=rotary)
    replace(node, new)
    return True
