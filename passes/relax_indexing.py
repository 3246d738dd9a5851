# SPDX-License-Identifier: Apache-2.0
"""ATen ops that read or write parts of a tensor, in Relax: without sort or atomic scatter, which CUDA lacks here.

Indices run along the last axis, whose width is known (experts, features), so that a scatter is a comparison of every
index with every place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gptq_compile.errors import PassError
from gptq_compile.kernels.tvm_env import relax
from gptq_compile.passes.program import where

aten = torch.ops.aten


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _last_axis(node: Any, x: Any, dim: int) -> int:
    """The static width of the last axis, which ``dim`` must name."""
    val = x.meta["val"]
    if dim % val.dim() != val.dim() - 1 or not isinstance(val.shape[-1], int):
        raise PassError(f"{where(node)} indexes dimension {dim}; only the last one has a translation.")
    return int(val.shape[-1])


def _empty(i: Any, node: Any) -> Any:
    """Memory that the model writes before it reads it; zeros, so that nothing depends on chance."""
    dtype = _name(node.meta["val"].dtype)
    return i.emit(relax.op.full(i.shape(node), relax.const(0, dtype), dtype))


def _copy(i: Any, node: Any) -> Any:
    value = i.value(node.args[1], node.meta["val"].dtype)
    return i.emit(relax.op.broadcast_to(value, i.shape(node)))


def _slice_scatter(i: Any, node: Any) -> Any:
    names = ("dim", "start", "end", "step")
    given = dict(zip(names, (0, None, None, 1), strict=True)) | dict(zip(names, node.args[2:], strict=False))
    given |= dict(node.kwargs)
    x, part = node.args[:2]
    dim = given["dim"] % x.meta["val"].dim()
    size = x.meta["val"].shape[dim]
    if not isinstance(size, int) or given["step"] != 1:
        raise PassError(f"{where(node)} writes into the token dimension or with a step, which has no translation.")
    start, end, _ = slice(given["start"], given["end"], 1).indices(size)
    cut = lambda a, b: i.emit(relax.op.strided_slice(i.env[x], [dim], [a], [b], [1]))  # noqa: E731
    pieces = [cut(0, start)] if start else []
    pieces.append(i.value(part, node.meta["val"].dtype))
    if end < size:
        pieces.append(cut(end, size))
    return i.emit(relax.op.concat(pieces, dim)) if len(pieces) > 1 else pieces[0]


def _gather(i: Any, node: Any) -> Any:
    x, dim, index = node.args[:3]
    shape = x.meta["val"].shape
    if not all(isinstance(size, int) for size in shape):  # a table without tokens may be indexed along any axis
        _last_axis(node, x, dim)
    return i.emit(relax.op.gather_elements(i.env[x], i.env[index], axis=dim % len(shape)))


def _scatter(i: Any, node: Any) -> Any:
    """``x`` with ``source`` at ``index``; of equal indices in a row, which torch leaves open, the values add up."""
    x, dim, index, source = node.args[:4]
    if node.kwargs:
        raise PassError(f"{where(node)} reduces while it scatters ({dict(node.kwargs)}), which has no translation.")
    dtype, width, rank = node.meta["val"].dtype, _last_axis(node, x, dim), x.meta["val"].dim()
    if any(a is not b and a != b for a, b in zip(index.meta["val"].shape[:-1], x.meta["val"].shape[:-1], strict=True)):
        raise PassError(f"{where(node)} scatters into a part of the rows, which has no translation.")
    places = relax.const(torch.arange(width).numpy())
    hit = i.emit(relax.op.equal(i.emit(relax.op.expand_dims(i.env[index], -1)), places))  # [..., indices, width]
    count = i.emit(relax.op.sum(i.emit(relax.op.astype(hit, "float32")), axis=[rank - 1]))
    written = i.emit(relax.op.greater(count, relax.const(0.0, "float32")))
    if isinstance(source, torch.fx.Node) and source.meta["val"].dim():
        values = i.emit(relax.op.expand_dims(i.value(source, torch.float32), -1))
        chosen = i.emit(relax.op.where(hit, values, relax.const(0.0, "float32")))
        new = i.emit(relax.op.astype(i.emit(relax.op.sum(chosen, axis=[rank - 1])), _name(dtype)))
    else:
        new = i.value(source, dtype)
    return i.emit(relax.op.where(written, new, i.value(x, dtype)))


RULES: dict[Any, Callable[[Any, Any], Any]] = {
    aten.new_empty.default: _empty,
    aten.empty.memory_format: _empty,
    aten.empty_like.default: _empty,
    aten.copy.default: _copy,
    aten.slice_scatter.default: _slice_scatter,
    aten.gather.default: _gather,
    aten.scatter.src: _scatter,
    aten.scatter.value: _scatter,
}
