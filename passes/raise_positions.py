# SPDX-License-Identifier: Apache-2.0
"""Makes positions explicit: what a model counts from the number of tokens, it shall read from ``position_ids``.

Models that take no position ids count tokens themselves (``arange(n)``, a running sum of an all-ones mask, the first n
rows of a table). In a batch of ragged tokens, the place in the batch is not the position. Every value that depends on n
alone and differs between tokens is evaluated; if it is ``a * position + b`` or rows of a table it is rewritten.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from gptq_compile.errors import PassError
from gptq_compile.passes import pattern
from gptq_compile.passes.manager import Pass
from gptq_compile.passes.program import Program, where
from gptq_compile.passes.token_parallel import check_token_parallel

aten = torch.ops.aten

_LENGTHS = (9, 14)
_UNINITIALIZED = frozenset({aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default})


class RaisePositions(Pass):
    """Rewrites ``arange(n)`` and its like to ``position_ids``; runs after attention is raised (its masks are gone)."""

    name = "raise_positions"

    def run(self, program: Program) -> bool:
        """Returns whether anything was rewritten.

        Raises:
            PassError: if a value depends on a token's place in the batch in a way that is no function of positions.
        """
        changed = pattern.erase_assertions(program.graph)
        known = pattern.data_nodes(program) | {program.input("position_ids")}
        blank: set[fx.Node] = set()
        for node in list(program.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in _UNINITIALIZED or pattern.movement_source(node) in blank:
                blank.add(node)
                continue
            if any(a in known for a in node.all_input_nodes) and node.target not in pattern.SHAPE_ONLY:
                known.add(node)
            if node in known or not isinstance(node.meta.get("val"), Tensor):
                continue
            dims = pattern.symbolic_dims(program, node)
            if not dims:
                continue
            values = {n: pattern.evaluate(program, [node], n)[node] for n in _LENGTHS}
            if all(_uniform(v, d) for v in values.values() for d in dims):
                if len(dims) == 1 and _is_head(program, node):
                    node.replace_all_uses_with(_first_row(program, node, dims[0]))
                    changed = True
                continue
            if len(dims) > 1:
                # A product of all positions with all positions is only good for masks, which are gone by now; if it
                # is still read, check_token_parallel says by whom.
                continue
            new = _from_table(program, node, dims[0], values) or _affine(program, node, dims[0], values)
            if new is None:
                raise PassError(
                    f"{where(node)} differs between tokens but is no linear function of their positions, so it has "
                    "no meaning for tokens of several sequences."
                )
            node.replace_all_uses_with(new)
            known.add(new)
            changed = True
        pattern.erase_dead_code(program.graph)
        return changed

    def ensures(self, program: Program) -> None:
        """Only attention mixes tokens."""
        check_token_parallel(program)


def _uniform(value: Tensor, dim: int) -> bool:
    return torch.equal(value, value.narrow(dim, 0, 1).expand_as(value))


def _affine(program: Program, node: fx.Node, dim: int, values: dict[int, Tensor]) -> fx.Node | None:
    """``position_ids * a + b`` in the shape of ``node``."""
    rank = node.meta["val"].dim()
    line = None
    for count, value in values.items():
        if value.dtype == torch.bool or value.shape[dim] != count:
            return None
        rows = value.movedim(dim, -1).reshape(-1, count).double()
        if not torch.equal(rows, rows[:1].expand_as(rows)):
            return None
        start, step = float(rows[0, 0]), float(rows[0, 1] - rows[0, 0])
        if not torch.equal(rows[0], start + step * torch.arange(count).double()):
            return None
        if line not in (None, (start, step)):
            return None
        line = (start, step)
    assert line is not None
    start, step = line
    integral = not node.meta["val"].is_floating_point()
    convert = int if integral else float
    n = pattern.token_count(program)
    with program.graph.inserting_before(node):
        out = program.input("position_ids")
        if node.meta["val"].dtype != torch.int64:
            out = program.call(aten._to_copy.default, (out,), {"dtype": node.meta["val"].dtype}, like=node)
        if step != 1:
            out = program.call(aten.mul.Tensor, (out, convert(step)), like=node)
        if start != 0:
            out = program.call(aten.add.Tensor, (out, convert(start)), like=node)
        shape: list[Any] = [1] * rank
        shape[dim] = n
        if rank != 2 or dim != 1:
            out = program.call(aten.view.default, (out, shape), like=node)
        full = [n if d == dim else s for d, s in enumerate(pattern.concrete_shape(program, node, 17))]
        if full != shape:
            out = program.call(aten.expand.default, (out, full), like=node)
    return out


def _is_head(program: Program, node: fx.Node) -> bool:
    """Whether ``node`` is the first rows, as many as there are tokens, of a value of fixed size."""
    source = node.args[0]
    return (
        node.target is aten.slice.Tensor and isinstance(source, fx.Node) and not pattern.symbolic_dims(program, source)
    )


def _first_row(program: Program, node: fx.Node, dim: int) -> fx.Node:
    """A table whose rows are all equal, as its first row for every token."""
    n = pattern.token_count(program)
    with program.graph.inserting_before(node):
        row = program.call(aten.slice.Tensor, (node.args[0], dim, 0, 1), like=node)
        sizes = [n if d == dim else s for d, s in enumerate(pattern.concrete_shape(program, node, 17))]
        return program.call(aten.expand.default, (row, sizes), like=node)


def _from_table(program: Program, node: fx.Node, dim: int, values: dict[int, Tensor]) -> fx.Node | None:
    """The first n rows of a value that does not depend on n, from some row on."""
    if not _is_head(program, node):
        return None
    table = node.args[0]
    assert isinstance(table, fx.Node)
    whole = pattern.evaluate(program, [table], 2)[table]
    start = int(node.args[2]) if len(node.args) > 2 and isinstance(node.args[2], int) else 0
    if not all(torch.equal(v, whole.narrow(dim, start, n)) for n, v in values.items()):
        return None
    with program.graph.inserting_before(node):
        index = program.call(aten.select.int, (program.input("position_ids"), 0, 0), like=node)
        if start:
            index = program.call(aten.add.Tensor, (index, start), like=node)
        return program.call(aten.index_select.default, (table, dim, index), like=node)
