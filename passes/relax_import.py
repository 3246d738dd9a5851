# SPDX-License-Identifier: Apache-2.0
"""ATen ops in Relax: TVM's own translation, with our spelling where shapes are symbolic or types would drift."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from gptq_compile.errors import PassError
from gptq_compile.kernels.tvm_env import relax
from gptq_compile.passes import relax_indexing
from gptq_compile.passes.common import Node, with_defaults
from gptq_compile.passes.program import where

# isort: split
# tvm_env makes the driver library loadable, which must be before anything of TVM is imported.
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

aten = torch.ops.aten


class Importer:
    """Translates one ATen node at a time.

    Args:
        builder: the Relax block builder, inside a function.
        shape: node -> its shape as TVM integers, from the program's fake values.
    """

    def __init__(self, builder: Any, shape: Callable[[Node], list[Any]]) -> None:
        self.builder, self.shape = builder, shape
        self._tvm = ExportedProgramImporter()
        self._tvm.block_builder = builder
        self.env: dict[Node, Any] = self._tvm.env
        self._reshaped: dict[Any, Any] = {}  # what a reshape made -> what it was made of

    def translate(self, node: Node) -> Any:
        """The Relax value of a node; its operands are in ``env``.

        Raises:
            PassError: if there is no translation, or it has another type than the program says.
        """
        val = node.meta.get("val")
        if isinstance(val, (int, torch.SymInt)):
            return None  # sizes are read from fake values, never computed
        rule = _RULES.get(node.target)
        if rule is not None:
            out = rule(self, node)
        else:
            name = node.target.__name__
            convert = self._tvm.convert_map.get(name)
            if convert is None:
                raise PassError(
                    f"{where(node)} has no translation to TVM. Please report the model; until then the op can be added "
                    "to passes/relax_import.py."
                )
            out = convert(node)
            if not isinstance(out, (relax.Var, tuple, list)):
                out = self.builder.emit(self.builder.normalize(out))
        if isinstance(val, torch.Tensor) and isinstance(out, relax.Expr):
            out = self._typed(out, node)
        return out

    def _typed(self, out: Any, node: Node) -> Any:
        """Casts to the dtype that the program says: the importer promotes some mixtures its own way."""
        want = str(node.meta["val"].dtype).removeprefix("torch.")
        if str(out.ty.dtype.dtype if hasattr(out.ty.dtype, "dtype") else out.ty.dtype) != want:
            out = self.builder.emit(relax.op.astype(out, want))
        return out

    def emit(self, expr: Any) -> Any:
        return self.builder.emit(expr)

    def reshape(self, value: Any, shape: list[Any]) -> Any:
        """A value in another shape. Of a reshape of a reshape only the last is left, and none that changes nothing."""
        source = self._reshaped.get(value, value)
        # A number of TVM's prints with its type.
        if [str(getattr(d, "value", d)) for d in source.ty.shape] == [str(d) for d in shape]:
            return source
        out = self.emit(relax.op.reshape(source, shape))
        self._reshaped[out] = source
        return out

    def value(self, arg: Any, dtype: torch.dtype) -> Any:
        """An operand: a node's value cast to ``dtype``, or a constant of that dtype."""
        name = str(dtype).removeprefix("torch.")
        if isinstance(arg, fx.Node):
            value = self.env[arg]
            return value if arg.meta["val"].dtype == dtype else self.emit(relax.op.astype(value, name))
        return relax.const(arg, name)


def _reshape(i: Importer, node: Node) -> Any:
    return i.reshape(i.env[node.args[0]], i.shape(node))


def _expand(i: Importer, node: Node) -> Any:
    return i.emit(relax.op.broadcast_to(i.env[node.args[0]], i.shape(node)))


def _binary(op: Callable[[Any, Any], Any], *, compare: bool = False, divide: bool = False) -> Callable:
    def rule(i: Importer, node: Node) -> Any:
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
            raise PassError(f"{where(node)} uses an argument that has no translation: {dict(node.kwargs)}.")
        a, b = node.args[:2]
        dtype = node.meta["val"].dtype
        if compare:
            tensors = [x.meta["val"] if isinstance(x, fx.Node) else x for x in (a, b)]
            dtype = torch.result_type(
                *(torch.empty((), dtype=t.dtype) if isinstance(t, torch.Tensor) else t for t in tensors)
            )
        return i.emit(op(i.value(a, dtype), i.value(b, dtype)))

    return rule


def _rsub(i: Importer, node: Node) -> Any:
    dtype = node.meta["val"].dtype
    return i.emit(relax.op.subtract(i.value(node.args[1], dtype), i.value(node.args[0], dtype)))


def _cast(i: Importer, node: Node) -> Any:
    return i.emit(relax.op.astype(i.env[node.args[0]], str(node.meta["val"].dtype).removeprefix("torch.")))


def _slice(i: Importer, node: Node) -> Any:
    x, dim, start, end, step = with_defaults(node.args, [None, 0, 0, None, 1])
    size = x.meta["val"].shape[dim]
    if not isinstance(size, int) or not all(isinstance(v, (int, type(None))) for v in (start, end, step)):
        raise PassError(f"{where(node)} cuts along the token dimension, which has no meaning for ragged tokens.")
    start, end, step = slice(start, end, step).indices(size)
    return i.emit(relax.op.strided_slice(i.env[x], [dim % x.meta["val"].dim()], [start], [end], [step]))


def _split(i: Importer, node: Node) -> Any:
    x, _, *dim = node.args
    axis = dim[0] if dim else node.kwargs.get("dim", 0)
    parts = [int(v.shape[axis]) for v in node.meta["val"]]
    ends = [sum(parts[: j + 1]) for j in range(len(parts))]
    return [
        i.emit(relax.op.strided_slice(i.env[x], [axis % x.meta["val"].dim()], [end - size], [end], [1]))
        for end, size in zip(ends, parts, strict=True)
    ]


def _getitem(i: Importer, node: Node) -> Any:
    source, index = node.args
    value = i.env[source]
    return value[index] if isinstance(value, (list, tuple)) else i.emit(relax.TupleGetItem(value, index))


def _cat(i: Importer, node: Node) -> Any:
    tensors, *dim = node.args
    axis = dim[0] if dim else node.kwargs.get("dim", 0)
    dtype = node.meta["val"].dtype
    return i.emit(relax.op.concat([i.value(t, dtype) for t in tensors], axis))


def _select(i: Importer, node: Node) -> Any:
    x, dim, index = node.args
    shape = x.meta["val"].shape
    dim = dim % len(shape)
    if not isinstance(shape[dim], int):
        raise PassError(f"{where(node)} picks one token of a sequence, which has no meaning for ragged tokens.")
    index = index % shape[dim]
    piece = i.emit(relax.op.strided_slice(i.env[x], [dim], [index], [index + 1], [1]))
    return i.emit(relax.op.reshape(piece, i.shape(node)))


def _index_select(i: Importer, node: Node) -> Any:
    x, dim, index = node.args
    return i.emit(relax.op.take(i.env[x], i.env[index], axis=dim % x.meta["val"].dim(), mode="clip"))


def _embedding(i: Importer, node: Node) -> Any:
    table, ids = node.args[:2]
    flat = i.emit(relax.op.reshape(i.env[ids], [-1]))
    rows = i.emit(relax.op.take(i.env[table], flat, axis=0, mode="clip"))
    return i.emit(relax.op.reshape(rows, i.shape(node)))


def _permute(i: Importer, node: Node) -> Any:
    rank = node.args[0].meta["val"].dim()
    if node.target is aten.permute.default:
        axes = [a % rank for a in node.args[1]]
    else:
        axes = list(range(rank))
        a, b = (d % rank for d in (node.args[1:] if node.target is aten.transpose.int else (0, 1)))
        axes[a], axes[b] = axes[b], axes[a]
    return i.emit(relax.op.permute_dims(i.env[node.args[0]], axes))


def _stack(i: Importer, node: Node) -> Any:
    tensors, *dim = node.args
    axis = (dim[0] if dim else node.kwargs.get("dim", 0)) % node.meta["val"].dim()
    return i.emit(relax.op.concat([i.emit(relax.op.expand_dims(i.env[t], axis)) for t in tensors], axis))


def _repeat_interleave(i: Importer, node: Node) -> Any:
    x, times, *dim = node.args
    axis = dim[0] if dim else node.kwargs.get("dim")
    if not isinstance(times, int) or axis is None:
        raise PassError(f"{where(node)} repeats by a tensor or without a dimension, which has no translation.")
    return i.emit(relax.op.repeat(i.env[x], times, axis % x.meta["val"].dim()))


def _full(i: Importer, node: Node) -> Any:
    fill = node.args[1] if node.target in (aten.full.default, aten.full_like.default, aten.new_full.default) else None
    if node.target is aten.new_full.default:
        fill = node.args[2]
    if fill is None:
        fill = 1 if "ones" in str(node.target) else 0
    dtype = str(node.meta["val"].dtype).removeprefix("torch.")
    return i.emit(relax.op.full(i.shape(node), relax.const(fill, dtype), dtype))


def _scalar_tensor(i: Importer, node: Node) -> Any:
    return relax.const(node.args[0], str(node.meta["val"].dtype).removeprefix("torch."))


def _pow(i: Importer, node: Node) -> Any:
    base, exponent = node.args
    dtype = node.meta["val"].dtype
    if isinstance(exponent, (int, float)) and exponent in (0.5, -0.5, -1):
        op = {0.5: relax.op.sqrt, -0.5: relax.op.rsqrt, -1: lambda x: relax.op.divide(i.value(1, dtype), x)}[exponent]
        return i.emit(op(i.value(base, dtype)))
    return i.emit(relax.op.power(i.value(base, dtype), i.value(exponent, dtype)))


def _where(i: Importer, node: Node) -> Any:
    dtype = node.meta["val"].dtype
    return i.emit(relax.op.where(i.env[node.args[0]], i.value(node.args[1], dtype), i.value(node.args[2], dtype)))


def _masked_fill(i: Importer, node: Node) -> Any:
    dtype = node.meta["val"].dtype
    x, mask, value = node.args
    return i.emit(relax.op.where(i.env[mask], i.value(value, dtype), i.value(x, dtype)))


def _clamp(i: Importer, node: Node) -> Any:
    x, low, high = with_defaults(node.args, [None, None, None])
    low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
    if node.target is aten.clamp_max.default:
        low, high = None, node.args[1]
    dtype, out = node.meta["val"].dtype, i.env[x]
    if low is not None:
        out = i.emit(relax.op.maximum(out, i.value(low, dtype)))
    if high is not None:
        out = i.emit(relax.op.minimum(out, i.value(high, dtype)))
    return out


def _gelu(i: Importer, node: Node) -> Any:
    tanh = node.kwargs.get("approximate", "none") == "tanh"
    return i.emit((relax.op.nn.gelu_tanh if tanh else relax.op.nn.gelu)(i.env[node.args[0]]))


def _matmul(i: Importer, node: Node) -> Any:
    dtype = node.meta["val"].dtype
    a, b = (i.value(x, dtype) for x in node.args[:2])
    return i.emit(relax.op.matmul(a, b, out_dtype="float32"))


_RULES: dict[Any, Callable[[Importer, Node], Any]] = {
    operator.getitem: _getitem,
    aten._to_copy.default: _cast,
    aten.to.dtype: _cast,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _split,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.select.int: _select,
    aten.index_select.default: _index_select,
    aten.embedding.default: _embedding,
    aten.permute.default: _permute,
    aten.transpose.int: _permute,
    aten.t.default: _permute,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.scalar_tensor.default: _scalar_tensor,
    aten.pow.Tensor_Scalar: _pow,
    aten.pow.Tensor_Tensor: _pow,
    aten.pow.Scalar: _pow,
    aten.rsub.Scalar: _rsub,
    aten.where.self: _where,
    aten.where.ScalarOther: _where,
    aten.where.ScalarSelf: _where,
    aten.where.Scalar: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: _clamp,
    aten.gelu.default: _gelu,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.mm.default: _matmul,
    **relax_indexing.RULES,
}
for _op in (
    aten.reshape.default, aten.view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.squeeze.default, aten.flatten.using_ints, aten.unflatten.int,
):  # fmt: skip
    _RULES[_op] = _reshape
for _name, _relax_op in (
    ("add", relax.op.add), ("sub", relax.op.subtract), ("mul", relax.op.multiply), ("div", relax.op.divide),
    ("maximum", relax.op.maximum), ("minimum", relax.op.minimum), ("bitwise_and", relax.op.bitwise_and),
    ("bitwise_or", relax.op.bitwise_or), ("logical_and", relax.op.logical_and), ("logical_or", relax.op.logical_or),
    ("fmod", relax.op.mod), ("remainder", relax.op.floor_mod), ("floor_divide", relax.op.floor_divide),
):  # fmt: skip
    for _overload in getattr(aten, _name).overloads():
        if _overload in ("Tensor", "Scalar", "default"):
            _RULES[getattr(getattr(aten, _name), _overload)] = _binary(_relax_op)
for _name, _relax_op in (
    ("lt", relax.op.less), ("le", relax.op.less_equal), ("gt", relax.op.greater), ("ge", relax.op.greater_equal),
    ("eq", relax.op.equal), ("ne", relax.op.not_equal),
):  # fmt: skip
    for _overload in ("Tensor", "Scalar"):
        _RULES[getattr(getattr(aten, _name), _overload)] = _binary(_relax_op, compare=True)
for _name in ("full", "zeros", "ones", "full_like", "zeros_like", "ones_like", "new_zeros", "new_ones", "new_full"):
    _RULES[getattr(aten, _name).default] = _full
del _op, _name, _relax_op, _overload
