# SPDX-License-Identifier: Apache-2.0
"""``normalize``: one spelling for each thing, and nothing that does not compute.

1. Assertions, aliases, copies, evaluation-mode dropout, and casts, views, expands and slices that change nothing go;
   ``view`` becomes ``reshape``, which has no opinion on strides.
2. A product with a parameter becomes ``aten.linear``: Conv1D's ``addmm`` (weight ``[K, N]``), ``matmul``, ``mm``; a
   transposed weight becomes a parameter of its own that is transposed when it is read.
3. Two transposes that undo each other go.
4. Small integer powers become products.
5. What depends on parameters alone and is not larger than them is folded into a parameter, evaluated when it is read.
   ``attrs["shifted"]`` says which are a parameter plus a number, as Gemma's ``1 + w``: name -> (parameter, number).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from gptq_compile.passes.common import Node, is_param, number, terms
from gptq_compile.passes.manager import Pass
from gptq_compile.passes.program import Program

aten = torch.ops.aten

_ASSERTIONS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
)
_COPIES = (
    aten.alias.default, aten.detach.default, aten.detach_.default, aten.clone.default, aten.contiguous.default,
    aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.dropout.default, aten.feature_dropout.default,
)  # fmt: skip
_CASTS = (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default)
_SAME_SHAPE = (
    aten.reshape.default, aten.expand.default, aten.slice.Tensor,
    aten.squeeze.dims, aten.squeeze.dim, aten.flatten.using_ints, aten.repeat.default,
)  # fmt: skip
_MAX_FOLDED = 1 << 24  # elements of one folded value


def _shape(node: Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _replace(node: Node, by: Node) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


class Normalize(Pass):
    """See the module's rules."""

    name = "normalize"

    def run(self, program: Program) -> bool:
        changed = False
        for rule in (self._drop_noops, self._linears, self._transposes, self._powers, self._fold):
            changed |= rule(program)
        changed |= program.graph.eliminate_dead_code(_is_impure)
        for node in list(program.graph.nodes):
            if node.op == "placeholder" and "param" in node.meta and not node.users:
                program.graph.erase_node(node)
                changed = True
        return changed

    def _drop_noops(self, program: Program) -> bool:
        changed = False
        for node in list(program.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in (aten.view.default, aten._unsafe_view.default):
                node.target = aten.reshape.default
                changed = True
            if node.target in _ASSERTIONS:
                program.graph.erase_node(node)
                changed = True
                continue
            source = node.args[0] if node.args else None
            if not isinstance(source, fx.Node):
                continue
            if not all(isinstance(v.meta.get("val"), torch.Tensor) for v in (node, source)):
                continue
            same_dtype = node.meta["val"].dtype == source.meta["val"].dtype
            noop = (
                node.target in _COPIES
                or (node.target in _CASTS and same_dtype)
                or (
                    node.target in _SAME_SHAPE
                    and _shape(node) == _shape(source)
                    and node.target is not aten.slice.Tensor
                )
                or (node.target is aten.slice.Tensor and _shape(node) == _shape(source) and _positive_step(node))
            )
            if noop and same_dtype:
                _replace(node, source)
                changed = True
        return changed

    def _linears(self, program: Program) -> bool:
        changed = False
        for node in list(program.graph.nodes):
            if node.op != "call_function":
                continue
            bias: Node | None = None
            if node.target is aten.addmm.default and not node.kwargs:
                bias, x, weight = node.args  # type: ignore[assignment]
            elif node.target in (aten.mm.default, aten.matmul.default):
                x, weight = node.args  # type: ignore[assignment]
            else:
                continue
            transposed = weight.op == "call_function" and weight.target in (
                aten.t.default,
                aten.transpose.int,
                aten.permute.default,
            )
            source: Node = weight.args[0] if transposed else weight  # type: ignore[assignment]
            if "param" not in source.meta or len(_shape(source)) != 2 or (bias is not None and len(_shape(bias)) != 1):
                continue
            if not transposed:
                source = transposed_param(program, source)
            with program.graph.inserting_before(node):
                new = program.call(aten.linear.default, (x, source) if bias is None else (x, source, bias), like=node)
            _replace(node, new)
            changed = True
        return changed | self._flatten_linears(program)

    def _flatten_linears(self, program: Program) -> bool:
        """``view(linear(view(x, [-1, K])), [1, n, N])`` -> ``linear(x)`` where x is ``[1, n, K]``."""
        changed = False
        for node in list(program.graph.nodes):
            if node.op != "call_function" or node.target is not aten.linear.default:
                continue
            x = node.args[0]
            if not (x.op == "call_function" and x.target is aten.reshape.default and len(_shape(x)) == 2):
                continue
            source = x.args[0]
            if _shape(source)[-1] != _shape(x)[-1] or len(_shape(source)) != 3:
                continue
            with program.graph.inserting_before(node):
                new = program.call(node.target, (source, *node.args[1:]), like=node)
            for user in list(node.users):
                if user.target is aten.reshape.default and _shape(user) == _shape(new):
                    _replace(user, new)
            if node.users:
                with program.graph.inserting_before(node):
                    flat = program.call(aten.reshape.default, (new, [-1, _shape(new)[-1]]), like=node)
                node.replace_all_uses_with(flat)
            program.graph.erase_node(node)
            changed = True
        return changed

    def _transposes(self, program: Program) -> bool:
        changed = False
        for node in list(program.graph.nodes):
            if node.op != "call_function" or node.target is not aten.transpose.int:
                continue
            inner = node.args[0]
            if inner.op == "call_function" and inner.target is aten.transpose.int:
                rank = len(_shape(node))
                axes = {a % rank for a in node.args[1:]}
                if axes == {a % rank for a in inner.args[1:]}:
                    _replace(node, inner.args[0])
                    changed = True
        return changed

    def _powers(self, program: Program) -> bool:
        changed = False
        for node in list(program.graph.nodes):
            if node.op != "call_function" or node.target is not aten.pow.Tensor_Scalar or node.args[1] not in (2, 3):
                continue
            x, exponent = node.args
            with program.graph.inserting_before(node):
                new = program.call(aten.mul.Tensor, (x, x), like=node)
                if exponent == 3:
                    new = program.call(aten.mul.Tensor, (new, x), like=node)
            _replace(node, new)
            changed = True
        return changed

    def _fold(self, program: Program) -> bool:
        constant: dict[Node, int] = {}  # node -> elements of the parameters it is made from
        for node in program.graph.nodes:
            if node.op == "placeholder" and "param" in node.meta:
                constant[node] = node.meta["val"].numel()
            elif node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor):
                inputs = node.all_input_nodes
                symbolic = any(isinstance(d, torch.SymInt) for d in _shape(node))
                random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
                if not symbolic and not random and all(i in constant for i in inputs):
                    constant[node] = sum(constant[i] for i in inputs)
        changed = False
        for node, size in constant.items():
            is_leaf = any(user not in constant for user in node.users)
            numel = node.meta["val"].numel()
            if node.op == "placeholder" or not is_leaf or numel > max(size, 4096) or numel > _MAX_FOLDED:
                continue
            name = f"folded.{node.name}"
            if name in program.params:
                continue
            _add_lazy(program, name, node)
            for base, by in terms(node):
                if is_param(base) and number(by) is not None:
                    program.attrs.setdefault("shifted", {})[name] = (base.meta["param"], by)
            folded = program._placeholder(name)
            for user in list(node.users):
                if user not in constant:
                    user.replace_input_with(node, folded)
            changed = True
        return changed


def transposed_param(program: Program, node: Node) -> Node:
    """The placeholder of a parameter's transpose, called ``<name>.T``; it is transposed when it is read."""
    base = node.meta["param"]
    name = f"{base}.T"
    if name not in program.params:
        params, (rows, columns) = program.params, program.params.shape(base)
        params.add(name, (columns, rows), params.dtype(base), lambda: params.get(base).t().contiguous())
    return program._placeholder(name)


def _add_lazy(program: Program, name: str, node: Node) -> None:
    """Registers the value of a constant expression, evaluated from the store each time it is read."""
    from gptq_compile.passes.interpret import Interpreter

    needed: list[Node] = []
    seen: set[Node] = set()

    def visit(n: Node) -> None:
        if n not in seen:
            seen.add(n)
            for i in n.all_input_nodes:
                visit(i)
            needed.append(n)

    visit(node)
    graph = fx.Graph()
    copies: dict[Node, Node] = {}
    for n in needed:
        copies[n] = graph.node_copy(n, copies.__getitem__)
    graph.output((copies[node],))
    frozen = Program(fx.GraphModule(torch.nn.Module(), graph), program.params, program.info)
    out = copies[node]

    def load() -> torch.Tensor:
        with torch.no_grad():
            return Interpreter(frozen).run({}, [out])[out].contiguous()

    val = node.meta["val"]
    program.params.add(name, tuple(val.shape), val.dtype, load)


def _positive_step(node: Node) -> bool:
    return len(node.args) < 5 or node.args[4] == 1


def _is_impure(node: Node) -> bool:
    return node.op in ("placeholder", "output")
