# SPDX-License-Identifier: Apache-2.0
"""Rules that follow the token dimension through one op each; ``token_parallel`` says which op has which rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from gptq_compile.passes import pattern
from gptq_compile.passes.program import Program

aten = torch.ops.aten
ops = torch.ops.gptq_compile


@dataclass(frozen=True)
class TokenAxis:
    """Where the tokens are in a value: dimension ``dim`` runs over ``outer x n x inner``, the tokens in the middle."""

    dim: int
    outer: int = 1
    inner: int = 1


Axes = dict[Any, TokenAxis]


class MixesTokensError(Exception):
    """Why an op is not token-parallel."""


def size(value: Any, dim: int) -> Any:
    return pattern.expression(value.shape[dim])


def token_dims(program: Program, node: fx.Node) -> list[int]:
    value = node.meta["val"]
    return pattern.symbolic_dims(program, value) if isinstance(value, Tensor) else []


def rank_of(node: Any) -> int:
    return node.meta["val"].dim()


def arg(node: Any, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def no_size_operand(program: Program, node: fx.Node) -> None:
    n = pattern.token_symbol(program)
    for a in node.all_input_nodes:
        value = a.meta.get("val")
        if isinstance(value, torch.SymInt | torch.SymFloat) and pattern.varies(value.node.expr, n):
            raise MixesTokensError("it computes with the number of tokens")


def broadcast(program: Program, node: Any, axes: Axes, rank: int | None = None) -> TokenAxis:
    """Operands that broadcast against each other must have their tokens in the same place."""
    rank = rank_of(node) if rank is None else rank
    found = {
        TokenAxis(axes[a].dim + rank - rank_of(a), axes[a].outer, axes[a].inner)
        for a in node.all_input_nodes
        if a in axes and isinstance(a.meta["val"], Tensor)
    }
    if len(found) != 1:
        raise MixesTokensError("it combines every token with every other token")
    return found.pop()


def pointwise(program: Program, node: Any, axes: Axes) -> TokenAxis:
    no_size_operand(program, node)
    return broadcast(program, node, axes)


def same(program: Program, node: Any, axes: Axes) -> TokenAxis | None:
    return axes.get(node.args[0])


def view(program: Program, node: Any, axes: Axes) -> TokenAxis:
    """A reshape keeps the row-major order, so what runs slower than the tokens must still do so."""
    source, axis = node.args[0], axes[node.args[0]]
    before = math.prod(pattern.concrete_shape(program, source, 17)[: axis.dim]) * axis.outer
    dims = token_dims(program, node)
    if len(dims) != 1:
        raise MixesTokensError(f"the number of tokens is in dimensions {dims} of its result instead of one")
    new_before = math.prod(pattern.concrete_shape(program, node, 17)[: dims[0]])
    count = size(node.meta["val"], dims[0]) / pattern.token_symbol(program)
    outer = before // max(new_before, 1)
    if before % max(new_before, 1) or not count.is_integer or int(count) % outer:
        raise MixesTokensError("it reinterprets memory across tokens")
    return TokenAxis(dims[0], outer, int(count) // outer)


def permute(program: Program, node: Any, axes: Axes) -> TokenAxis:
    axis, rank = axes[node.args[0]], rank_of(node)
    if node.target is aten.permute.default:
        order = [d % rank for d in node.args[1]]
    else:
        order = list(range(rank))
        a, b = (-1, -2) if len(node.args) == 1 else node.args[1:3]
        a, b = a % rank, b % rank
        order[a], order[b] = order[b], order[a]
    return TokenAxis(order.index(axis.dim), axis.outer, axis.inner)


def expand(program: Program, node: Any, axes: Axes) -> TokenAxis:
    return broadcast(program, node, axes)


def repeat_rule(program: Program, node: Any, axes: Axes) -> TokenAxis:
    axis = broadcast(program, node, axes)
    if node.args[1][axis.dim] != 1:
        raise MixesTokensError("it repeats the sequence")
    return axis


def repeat_interleave(program: Program, node: Any, axes: Axes) -> TokenAxis:
    axis = axes[node.args[0]]
    times, dim = node.args[1], arg(node, 2, "dim")
    if dim is None:
        raise MixesTokensError("it flattens the sequence")
    if dim % rank_of(node) == axis.dim:
        return TokenAxis(axis.dim, axis.outer, axis.inner * int(times))
    return axis


def along(what: str, dim_index: int = 1, default: Any = None, drops: bool = False) -> Callable[..., TokenAxis]:
    """An op that works along one dimension (``args[dim_index]``), which must not be the tokens'."""

    def rule(program: Program, node: Any, axes: Axes) -> TokenAxis:
        source = node.args[0]
        axis, rank = axes[source], rank_of(source)
        dim = arg(node, dim_index, "dim", default) % rank
        if dim == axis.dim:
            raise MixesTokensError(what)
        return TokenAxis(axis.dim - 1, axis.outer, axis.inner) if drops and dim < axis.dim else axis

    return rule


def slice_rule(program: Program, node: Any, axes: Axes) -> TokenAxis:
    source = node.args[0]
    axis = axes[source]
    dim = arg(node, 1, "dim", 0) % rank_of(node)
    same = size(node.meta["val"], dim) == size(source.meta["val"], dim)
    if dim == axis.dim and not same:
        raise MixesTokensError("it takes some of the tokens by their place in the batch")
    return axis


def reduce(what: str) -> Callable[..., TokenAxis]:
    """An op over ``dim`` (an int, a list, or everything), with ``keepdim``."""

    def rule(program: Program, node: Any, axes: Axes) -> TokenAxis:
        source = node.args[0]
        axis, rank = axes[source], rank_of(source)
        dims = arg(node, 1, "dim")
        if dims is None or dims == []:
            raise MixesTokensError(f"{what} over all tokens")
        reduced = sorted({d % rank for d in (dims if isinstance(dims, list | tuple) else [dims])})
        if axis.dim in reduced:
            raise MixesTokensError(f"{what} over the sequence")
        value = node.meta["val"][0] if isinstance(node.meta["val"], tuple | list) else node.meta["val"]
        if value.dim() == rank:
            return axis
        return TokenAxis(axis.dim - sum(d < axis.dim for d in reduced), axis.outer, axis.inner)

    return rule


def linear(program: Program, node: Any, axes: Axes) -> TokenAxis:
    x = node.args[0]
    extra = [a for a in node.all_input_nodes if a in axes and a is not x]
    if x not in axes or extra:
        raise MixesTokensError("its weight depends on the tokens")
    if axes[x].dim == rank_of(x) - 1:
        raise MixesTokensError("a linear layer over the sequence")
    return axes[x]


def expert_linear(position: int) -> Callable[[Program, Any, Axes], TokenAxis]:
    """A linear of experts whose argument number ``position`` says which expert reads a row."""

    def rule(program: Program, node: Any, axes: Axes) -> TokenAxis:
        x, expert = node.args[0], node.args[position]
        extra = [a for a in node.all_input_nodes if a in axes and a not in (x, expert)]
        if extra or axes.get(x) != axes.get(expert) or axes[x].dim == rank_of(x) - 1:
            raise MixesTokensError("its experts are not chosen token by token")
        return axes[x]

    return rule


def matmul(program: Program, node: Any, axes: Axes) -> TokenAxis:
    bias, (a, b) = (None, node.args[:2]) if node.target in PRODUCTS else (node.args[0], node.args[1:3])
    rank = rank_of(node)
    found = set()
    for operand, contracted in ((a, -1), (b, -2)):
        if operand not in axes:
            continue
        axis, own = axes[operand], rank_of(operand)
        if axis.dim == own + contracted or own == 1:
            raise MixesTokensError("a product that sums over the sequence")
        found.add(TokenAxis(axis.dim + rank - own, axis.outer, axis.inner))
    if bias in axes:
        axis = axes[bias]
        found.add(TokenAxis(axis.dim + rank - rank_of(bias), axis.outer, axis.inner))
    if len(found) != 1:
        raise MixesTokensError("a product of all tokens with all tokens")
    return found.pop()


def layer_norm(program: Program, node: Any, axes: Axes) -> TokenAxis:
    axis = axes[node.args[0]]
    if axis.dim >= rank_of(node.args[0]) - len(node.args[1]):
        raise MixesTokensError("a normalization over the sequence")
    return axis


def last_dim(program: Program, node: Any, axes: Axes) -> TokenAxis:
    axis = axes[node.args[0]]
    if axis.dim == rank_of(node.args[0]) - 1:
        raise MixesTokensError("a normalization over the sequence")
    return axis


def embedding(program: Program, node: Any, axes: Axes) -> TokenAxis:
    if node.args[0] in axes:
        raise MixesTokensError("its table depends on the tokens")
    return axes[node.args[1]]


def index_select(program: Program, node: Any, axes: Axes) -> TokenAxis:
    x, dim, index = node.args
    dim = dim % rank_of(x)
    if x in axes and (index in axes or dim == axes[x].dim):
        raise MixesTokensError("it picks values of other tokens")
    if x in axes:
        return axes[x]
    axis = axes[index]
    return TokenAxis(dim, axis.outer, axis.inner)


def gather(program: Program, node: Any, axes: Axes) -> TokenAxis:
    dim = node.args[1] % rank_of(node)
    others = [a for a in node.all_input_nodes if isinstance(a.meta["val"], Tensor)]
    axis = broadcast(program, node, axes)
    if axis.dim == dim and (node.args[0] in axes or node.target is not aten.gather.default):
        raise MixesTokensError("it picks values of other tokens")
    if axis.dim != dim and any(a not in axes and rank_of(a) and a is not node.args[0] for a in others):
        raise MixesTokensError("its index does not depend on the token it picks for")
    return axis


def index_rule(program: Program, node: Any, axes: Axes) -> TokenAxis:
    x, indices = node.args[:2]
    used = [i for i, index in enumerate(indices) if index is not None]
    tensors = [indices[i] for i in used]
    contiguous = used == list(range(used[0], used[-1] + 1))
    width = max(rank_of(t) for t in tensors)
    with_tokens = [t for t in tensors if t in axes]
    start = used[0] if contiguous else 0
    if x in axes:
        if with_tokens or axes[x].dim in used:
            raise MixesTokensError("it picks values of other tokens")
        axis = axes[x]
        moved = sum(u < axis.dim for u in used)
        ahead = width if (not contiguous or start < axis.dim) else 0
        return TokenAxis(axis.dim - moved + ahead, axis.outer, axis.inner)
    found = {TokenAxis(axes[t].dim + width - rank_of(t) + start, axes[t].outer, axes[t].inner) for t in with_tokens}
    if len(found) != 1:
        raise MixesTokensError("it picks values of other tokens")
    return found.pop()


def members(node: Any, axes: Axes) -> TokenAxis:
    found = {axes[a] for a in node.args[0] if a in axes}
    if len(found) != 1:
        raise MixesTokensError("its parts have their tokens in different places")
    return found.pop()


def cat(program: Program, node: Any, axes: Axes) -> TokenAxis:
    axis = members(node, axes)
    if arg(node, 1, "dim", 0) % rank_of(node) == axis.dim:
        raise MixesTokensError("it adds to or shifts the sequence")
    return axis


def stack(program: Program, node: Any, axes: Axes) -> TokenAxis:
    axis = members(node, axes)
    dim = arg(node, 1, "dim", 0) % rank_of(node)
    return TokenAxis(axis.dim + (dim <= axis.dim), axis.outer, axis.inner)


def pad(program: Program, node: Any, axes: Axes) -> TokenAxis:
    axis = axes[node.args[0]]
    pads = list(node.args[1])
    k = 2 * (rank_of(node) - 1 - axis.dim)
    if any(p != 0 for p in pads[k : k + 2]):
        raise MixesTokensError("it pads or shifts the sequence")
    return axis


def attention(program: Program, node: Any, axes: Axes) -> TokenAxis:
    if any(axes.get(a) != TokenAxis(1) for a in node.args[:3]):
        raise MixesTokensError("its queries, keys or values are not token-major")
    return TokenAxis(1)


PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default, aten.mv.default})


class _NormView:
    """``linalg_vector_norm(x, ord, dim, keepdim)`` seen as ``reduce(x, dim, keepdim)``."""

    def __init__(self, node: fx.Node) -> None:
        self.args = (node.args[0], *node.args[2:])
        self.kwargs, self.meta = node.kwargs, node.meta


def norm_args(node: fx.Node) -> Any:
    return _NormView(node)
