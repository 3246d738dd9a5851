# SPDX-License-Identifier: Apache-2.0
"""The table of ATen ops that the passes leave in a program -> ONNX operators."""

from __future__ import annotations

import operator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from gptq_compile.errors import PassError
from gptq_compile.onnx.builder import element_type
from gptq_compile.onnx.dialect_rules import activation
from gptq_compile.onnx.lowering import NUMPY, Lowering, aten, rule
from gptq_compile.passes.common import Node, is_node, rank, shape
from gptq_compile.passes.program import where

_END = (1 << 63) - 1


def _type(node: Node) -> torch.dtype:
    return node.meta["val"].dtype


_UNARY = {
    aten.cos.default: "Cos", aten.sin.default: "Sin", aten.exp.default: "Exp", aten.log.default: "Log",
    aten.sqrt.default: "Sqrt", aten.abs.default: "Abs", aten.neg.default: "Neg", aten.tanh.default: "Tanh",
    aten.sigmoid.default: "Sigmoid", aten.relu.default: "Relu", aten.floor.default: "Floor", aten.ceil.default: "Ceil",
    aten.erf.default: "Erf", aten.reciprocal.default: "Reciprocal", aten.softplus.default: "Softplus",
    aten.logical_not.default: "Not", aten.bitwise_not.default: "Not",
}  # fmt: skip
_BINARY = {
    aten.mul.Tensor: "Mul", aten.mul.Scalar: "Mul", aten.div.Tensor: "Div", aten.div.Scalar: "Div",
    aten.minimum.default: "Min", aten.maximum.default: "Max", aten.logical_and.default: "And",
    aten.logical_or.default: "Or", aten.bitwise_and.Tensor: "And", aten.bitwise_or.Tensor: "Or",
}  # fmt: skip
_COMPARE = {
    aten.eq: "Equal", aten.lt: "Less", aten.le: "LessOrEqual", aten.gt: "Greater", aten.ge: "GreaterOrEqual",
}  # fmt: skip


@rule(*_UNARY)
def _unary(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    if _UNARY[node.target] == "Not" and _type(node) != torch.bool:
        raise PassError(f"{where(node)} inverts the bits of integers, which has no form in ONNX here.")
    first = next(iter(vars(a).values()))
    return c.b.node(_UNARY[node.target], [c.operand(first, _type(node))])


@rule(*_BINARY)
def _binary(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    name = _BINARY[node.target]
    if name in ("And", "Or") and _type(node) != torch.bool:
        raise PassError(f"{where(node)} combines the bits of integers, which has no form in ONNX here.")
    return c.b.node(name, [c.operand(a.self, _type(node)), c.operand(a.other, _type(node))])


@rule(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar)
def _sum(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    dtype = _type(node)
    left, right = c.operand(a.self, dtype), c.operand(a.other, dtype)
    if node.target is aten.rsub.Scalar:
        left, right = right, left
    if a.alpha != 1:
        right = c.b.node("Mul", [right, c.b.constant(a.alpha, NUMPY[dtype])])
    return c.b.node("Add" if node.target in (aten.add.Tensor, aten.add.Scalar) else "Sub", [left, right])


@rule(*(getattr(op, kind) for op in _COMPARE for kind in ("Tensor", "Scalar")))
def _compare(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    values = [v.meta["val"] if is_node(v) else v for v in (a.self, a.other)]
    dtype = torch.result_type(*values)
    return c.b.node(_COMPARE[node.target.overloadpacket], [c.operand(a.self, dtype), c.operand(a.other, dtype)])


@rule(aten.square.default, aten.rsqrt.default, aten.silu.default)
def _product(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    x = c.operand(a.self, _type(node))
    if node.target is aten.rsqrt.default:
        return c.b.node("Reciprocal", [c.b.node("Sqrt", [x])])
    return c.b.node("Mul", [x, x]) if node.target is aten.square.default else activation(c, "silu", x)


@rule(aten.gelu.default)
def _gelu(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    return c.b.node("Gelu", [c.operand(a.self, _type(node))], approximate=a.approximate)


@rule(aten.pow.Tensor_Scalar)
def _pow(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    dtype = _type(node)
    return c.b.node("Pow", [c.operand(a.self, dtype), c.b.constant(a.exponent, NUMPY[dtype])])


@rule(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
def _clamp(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    bounds = [getattr(a, side, None) for side in ("min", "max")]
    inputs = [c.operand(a.self, _type(node)), *("" if v is None else c.operand(v, _type(node)) for v in bounds)]
    return c.b.node("Clip", inputs)


@rule(aten._to_copy.default, aten.to.dtype, aten.clone.default, aten.contiguous.default, aten.alias.default)
def _copy(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    return c.b.node("Cast", [c.value(a.self)], to=element_type(NUMPY[_type(node)]))


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
def _where(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    return c.b.node("Where", [c.value(a.condition), c.operand(a.self, _type(node)), c.operand(a.other, _type(node))])


@rule(aten.masked_fill.Scalar)
def _masked_fill(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    return c.b.node("Where", [c.value(a.mask), c.operand(a.value, _type(node)), c.operand(a.self, _type(node))])


@rule(aten.linear.default)
def _linear(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    # Gemm takes the weight as it is stored, so that one tensor serves lm_head and embedding.
    dtype, (rows, columns) = _type(node), shape(a.weight)
    flat = c.reshape(c.operand(a.input, dtype), -1, columns)
    inputs = [flat, c.operand(a.weight, dtype), *([] if a.bias is None else [c.operand(a.bias, dtype)])]
    out = c.b.node("Gemm", inputs, transB=1)
    c.b.value(out, NUMPY[dtype], ("tokens", rows))
    return c.reshape(out, *c.fixed_shape(node, -1))


@rule(aten.matmul.default, aten.bmm.default, aten.mm.default)
def _matmul(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    return c.b.node("MatMul", [c.operand(v, _type(node)) for v in vars(a).values()])


@rule(aten.embedding.default)
def _embedding(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    return c.b.node("Gather", [c.value(a.weight), c.value(a.indices)], axis=0)


@rule(aten.index_select.default)
def _index_select(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    return c.b.node("Gather", [c.value(a.self), c.value(a.index)], axis=a.dim % rank(a.self))


@rule(aten.gather.default)
def _gather(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    return c.b.node("GatherElements", [c.value(a.self), c.value(a.index)], axis=a.dim % rank(a.self))


@rule(aten.index.Tensor)
def _index(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    given = [(axis, index) for axis, index in enumerate(a.indices) if index is not None]
    if len(given) != 1 or _type(given[0][1]) == torch.bool:
        raise PassError(f"{where(node)} indexes by several tensors or by a mask, which has no form in ONNX here.")
    axis, index = given[0]
    return c.b.node("Gather", [c.value(a.self), c.value(index)], axis=axis)


@rule(aten.select.int)
def _select(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    return c.b.node("Gather", [c.value(a.self), c.b.constant(a.index, np.int64)], axis=a.dim % rank(a.self))


@rule(aten.slice.Tensor)
def _slice(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    if node in c.divided:
        return c.divided[node]
    if any(is_node(v) for v in (a.start, a.end, a.step)):
        raise PassError(f"{where(node)} cuts at a place that depends on the number of tokens.")
    end = _END if a.end is None else a.end
    return c.slice(c.value(a.self), a.start or 0, end, a.step, a.dim % rank(a.self))


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default)
def _split(c: Lowering, node: Node, a: SimpleNamespace) -> Any:
    axis = a.dim % rank(a.self)
    sizes = [v.shape[axis] for v in node.meta["val"]]
    if not all(isinstance(s, int) for s in sizes):
        raise PassError(f"{where(node)} splits the tokens.")
    made = c.b.node("Split", [c.value(a.self), c.b.ints(*sizes)], len(sizes), axis=axis)
    return (made,) if len(sizes) == 1 else made


@rule(operator.getitem)
def _getitem(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    source, index = a.args
    return c.values(source)[index]


@rule(aten.cat.default)
def _cat(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    return c.b.node("Concat", [c.operand(t, _type(node)) for t in a.tensors], axis=a.dim % rank(node))


@rule(aten.stack.default)
def _stack(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    axis = a.dim % rank(node)
    pieces = [c.b.node("Unsqueeze", [c.operand(t, _type(node)), c.b.ints(axis)]) for t in a.tensors]
    return c.b.node("Concat", pieces, axis=axis)


@rule(
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.squeeze.default, aten.flatten.using_ints, aten.unflatten.int,
)  # fmt: skip
def _reshape(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    first = next(iter(vars(a).values()))
    return c.reshape(c.value(first), *c.fixed_shape(node, -1))


@rule(aten.permute.default, aten.transpose.int, aten.t.default)
def _permute(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    order = list(range(rank(node)))
    if node.target is aten.permute.default:
        order = [d % rank(node) for d in a.dims]
    else:
        i, j = (0, 1) if node.target is aten.t.default else (a.dim0, a.dim1)
        order[i], order[j] = order[j], order[i]
    return c.b.node("Transpose", [c.value(a.self)], perm=order)


@rule(aten.expand.default)
def _expand(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    have, want = c.shape(a.self), c.shape(node)
    for old, new in zip(have, want[len(want) - len(have) :], strict=True):
        if not isinstance(new, int) and old != new:
            raise PassError(f"{where(node)} copies values once a token, which has no form in ONNX here.")
    if not all(isinstance(d, int) for d in want[: len(want) - len(have)]):
        raise PassError(f"{where(node)} copies values once a token, which has no form in ONNX here.")
    return c.b.node("Expand", [c.value(a.self), c.b.ints(*c.fixed_shape(node, 1))])


@rule(aten.repeat.default)
def _repeat(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    x = c.value(a.self)
    if len(a.repeats) > rank(a.self):
        x = c.reshape(x, *[1] * (len(a.repeats) - rank(a.self)), *c.fixed_shape(a.self, -1))
    return c.b.node("Tile", [x, c.b.ints(*a.repeats)])


@rule(aten.repeat_interleave.self_int)
def _repeat_interleave(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    axis = a.dim % rank(a.self)
    copies = [1] * (rank(a.self) + 1)
    copies[axis + 1] = a.repeats
    wide = c.b.node("Unsqueeze", [c.value(a.self), c.b.ints(axis + 1)])
    return c.reshape(c.b.node("Expand", [wide, c.b.ints(*copies)]), *c.fixed_shape(node, -1))


@rule(aten.softmax.int, aten._softmax.default)
def _softmax(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    return c.b.node("Softmax", [c.operand(a.self, _type(node))], axis=a.dim % rank(node))


@rule(aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default)
def _reduce(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    kind = {aten.sum.dim_IntList: "ReduceSum", aten.mean.dim: "ReduceMean", aten.amax.default: "ReduceMax"}
    axes = [d % rank(a.self) for d in (a.dim or range(rank(a.self)))]
    x = c.operand(a.self, _type(node))
    return c.b.node(kind.get(node.target, "ReduceMin"), [x, c.b.ints(*axes)], keepdims=int(a.keepdim))


@rule(aten.topk.default)
def _topk(c: Lowering, node: Node, a: SimpleNamespace) -> Any:
    options = {"axis": a.dim % rank(a.self), "largest": int(a.largest), "sorted": int(a.sorted)}
    return c.b.node("TopK", [c.value(a.self), c.b.ints(a.k)], 2, **options)


@rule(aten.scatter.src, aten.scatter.value)
def _scatter(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    index = c.value(a.index)
    if node.target is aten.scatter.src:
        updates = c.operand(a.src, _type(node))
    else:
        updates = c.b.node("Expand", [c.operand(a.value, _type(node)), c.b.node("Shape", [index])])
    return c.b.node("ScatterElements", [c.value(a.self), index, updates], axis=a.dim % rank(node))


@rule(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default)
def _filled(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    fill = {aten.zeros_like.default: 0, aten.ones_like.default: 1}.get(node.target, getattr(a, "fill_value", 0))
    return c.b.node("Expand", [c.operand(fill, _type(node)), c.b.node("Shape", [c.value(a.self)])])
