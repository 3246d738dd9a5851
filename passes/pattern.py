# SPDX-License-Identifier: Apache-2.0
"""Helpers that recognise patterns by dataflow and by *evaluation*: what a subgraph computes, not how it is written.

Shapes hold one symbol ``n``, the number of tokens. Subgraphs that do not depend on the token ids can be run for a
concrete ``n``; data movement (views, transposes, expansions ...) can be run on a tensor of element numbers, which
gives the exact index map of a chain of any length.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from gptq_compile.passes.interpret import Interpreter
from gptq_compile.passes.program import Program

aten = torch.ops.aten

MOVEMENT = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.transpose.int,
        aten.t.default,
        aten.mT.default,
        aten.permute.default,
        aten.movedim.int,
        aten.movedim.intlist,
        aten.swapaxes.default,
        aten.swapdims.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.expand.default,
        aten.broadcast_to.default,
        aten.repeat.default,
        aten.repeat_interleave.self_int,
        aten.clone.default,
        aten.contiguous.default,
        aten.alias.default,
        aten.detach.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.narrow.default,
        aten.split.Tensor,
        aten.split.sizes,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unbind.int,
        operator.getitem,
    }
)
"""Ops with one data input whose result holds elements of it and nothing else."""

CASTS = frozenset({aten._to_copy.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.type_as.default})
"""Casts; between floating types they do not change what is computed."""

ASSERTIONS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_async.msg,
        aten._assert_scalar.default,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
        torch._check,
    }
)

SHAPE_ONLY = frozenset(
    {
        aten.sym_size.int,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.empty_like.default,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.new_full.default,
        aten.new_empty.default,
    }
)
"""Ops that read the shape of a tensor and not its values."""


def erase_assertions(graph: fx.Graph) -> bool:
    """Removes run-time assertions, then dead code; returns whether anything went.

    The assertions state facts about the trace (dtypes, ranges of n) that the compiled entries fix anyway.
    """
    dead = [n for n in graph.nodes if n.op == "call_function" and n.target in ASSERTIONS and not n.users]
    for node in dead:
        graph.erase_node(node)
    return erase_dead_code(graph) or bool(dead)


def erase_dead_code(graph: fx.Graph) -> bool:
    """Removes calls without users, and parameters without users."""
    changed = False
    for node in reversed(list(graph.nodes)):
        unused_param = node.op == "placeholder" and "param" in node.meta
        if not node.users and (node.op == "call_function" or unused_param):
            graph.erase_node(node)
            changed = True
    return changed


def data_nodes(program: Program) -> set[fx.Node]:
    """The nodes whose value depends on the values of ``input_ids`` (not just on how many there are)."""
    found = {program.input("input_ids")}
    for node in program.graph.nodes:
        if node.target not in SHAPE_ONLY and any(a in found for a in node.all_input_nodes):
            found.add(node)
    return found


def token_symbol(program: Program) -> sympy.Symbol:
    """The symbol ``n`` of the token dimension."""
    return program.input("input_ids").meta["val"].shape[1].node.expr


def expression(size: int | torch.SymInt) -> sympy.Expr:
    """A size as a sympy expression in ``n``."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def symbolic_dims(program: Program, value: fx.Node | Tensor) -> list[int]:
    """Dimensions of a node's (fake) value that depend on ``n``."""
    n = token_symbol(program)
    shape = (value.meta["val"] if isinstance(value, fx.Node) else value).shape
    return [d for d, s in enumerate(shape) if varies(expression(s), n)]


def varies(size: sympy.Expr, n: sympy.Symbol) -> bool:
    """Whether a size really depends on ``n``: slicing leaves constants such as ``1 - max(0, 1 - n)``."""
    return size.has(n) and (size == n or len({size.subs(n, count) for count in (2, 17, 40)}) > 1)


def concrete_shape(program: Program, node: fx.Node, n: int) -> list[int]:
    """The shape of ``node``'s value for ``n`` tokens."""
    symbol = token_symbol(program)
    return [int(expression(s).subs(symbol, n)) for s in node.meta["val"].shape]


def token_count(program: Program) -> fx.Node:
    """A node that holds ``n``, ahead of every other call."""
    ids = program.input("input_ids")
    first = next(x for x in program.graph.nodes if x.op == "call_function")
    if first.target is aten.sym_size.int and first.args == (ids, 1):
        return first
    with program.graph.inserting_before(first):
        return program.call(aten.sym_size.int, (ids, 1))


def ancestors(want: Iterable[fx.Node], stop: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """``want`` and everything they are computed from, not looking behind ``stop``."""
    stop, seen, todo = set(stop), set(), list(want)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            if node not in stop:
                todo.extend(node.all_input_nodes)
    return seen


def evaluate(
    program: Program,
    want: Iterable[fx.Node],
    n: int,
    *,
    offset: int = 0,
    given: dict[fx.Node, Any] | None = None,
) -> dict[fx.Node, Any]:
    """Runs just the subgraph of ``want`` for ``n`` tokens at positions ``offset .. offset + n - 1`` with all-zero ids.

    Args:
        given: values to take instead of computing them.
    """
    given, want = given or {}, list(want)
    env: dict[fx.Node, Any] = dict(given)
    for node in program.inputs:
        shape = concrete_shape(program, node, n) if node.name != "logit_rows" else [1]
        env[node] = torch.zeros(shape, dtype=node.meta["val"].dtype)
    env[program.input("position_ids")] += torch.arange(offset, offset + n)
    needed = ancestors(want, given)
    nodes = [x for x in program.graph.nodes if x in needed and x not in given]
    with torch.no_grad():
        return Interpreter(program).run(env, want, nodes)


def movement_source(node: fx.Node) -> fx.Node | None:
    """The tensor whose elements ``node`` rearranges (or casts), or None if it does anything else."""
    if node.op != "call_function" or node.target not in MOVEMENT | CASTS:
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return None
    values = [x.meta.get("val") for x in (source, node)]
    if node.target in CASTS and not all(isinstance(v, Tensor) and v.is_floating_point() for v in values):
        return None
    return source


def index_map(program: Program, source: fx.Node, node: fx.Node, n: int) -> Tensor:
    """For every element of ``node`` the number of the element of ``source`` that it holds, for ``n`` tokens."""
    shape = concrete_shape(program, source, n)
    numbers = torch.arange(int(torch.Size(shape).numel()), dtype=torch.float64).reshape(shape)
    if node is source:
        return numbers.long()
    chain: dict[fx.Node, Any] = {source: numbers}
    todo = []
    step = node
    while step is not source:
        todo.append(step)
        step = movement_source(step) or step.args[0]  # type: ignore[assignment]
    for step in reversed(todo):
        # Casts would round the numbers; factors on the way do not move elements.
        moves, from_ = step.target in MOVEMENT, step.args[0]
        assert isinstance(from_, fx.Node)
        chain[step] = evaluate(program, [step], n, given={from_: chain[from_]})[step] if moves else chain[from_]
    return chain[node].long()


def rearranged(program: Program, source: fx.Node, wanted: dict[int, Tensor], sizes: list[Any]) -> fx.Node | None:
    """Inserts the shortest ``permute`` + ``view`` of ``source`` that gives a wanted arrangement.

    Args:
        wanted: for a few ``n``, the number of ``source``'s element at each place of the result.
        sizes: the result's shape as arguments of ``view`` (ints and nodes).

    Returns:
        The new node (``source`` itself if nothing moves), or None if no permutation gives the arrangement.
    """
    shapes = {n: concrete_shape(program, source, n) for n in wanted}
    rank = len(next(iter(shapes.values())))
    some = next(iter(wanted))
    long_dims = [d for d in range(rank) if any(s[d] != 1 for s in shapes.values())]
    unit_dims = [d for d in range(rank) if d not in long_dims]
    if any(int(torch.Size(shapes[n]).numel()) != w.numel() for n, w in wanted.items()) or len(long_dims) > 5:
        return None
    for order in itertools.permutations(long_dims):
        if not all(
            torch.equal(torch.arange(w.numel()).reshape(shapes[n]).permute(*order, *unit_dims).reshape(w.shape), w)
            for n, w in wanted.items()
        ):
            continue
        result = source
        if list(order) != long_dims:
            # Unit dimensions stay where they are, so that [1, heads, n, d] -> [1, n, heads, d] is one permute.
            it = iter(order)
            dims = [next(it) if d in long_dims else d for d in range(rank)]
            result = program.call(aten.permute.default, (source, dims), like=source)
            merges = [s for s in (shapes[some][d] for d in dims) if s != 1] != [s for s in wanted[some].shape if s != 1]
            if merges:
                result = program.call(
                    aten.clone.default, (result,), {"memory_format": torch.contiguous_format}, like=source
                )
        have = concrete_shape(program, result, some)
        if have != list(wanted[some].shape):
            result = program.call(aten.view.default, (result, sizes), like=source)
        return result
    return None
