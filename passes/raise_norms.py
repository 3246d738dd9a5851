# SPDX-License-Identifier: Apache-2.0
"""``raise_norms``: every spelling of RMSNorm and LayerNorm over the last axis becomes one op.

1. ``x * rsqrt(mean(x^2) + eps)``, with the reciprocal root spelled ``rsqrt``, ``pow(-0.5)``, ``1 / sqrt``, or a
   division by ``sqrt``, becomes ``rms_norm``.
2. A product with a per-channel parameter, or with ``1 + parameter``, becomes its weight.
3. ``rms_norm`` of ``x - mean(x)``, or of the same with ``var``, is ``layer_norm``; a per-channel parameter that is then
   added is its bias.
4. ``aten.rms_norm`` and ``aten.layer_norm`` over the last axis become ours.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch

from gptq_compile.passes.common import (
    CASTS,
    Node,
    dims_arg,
    dtype,
    eliminate_dead,
    factors,
    is_call,
    is_node,
    is_param,
    number,
    rank,
    replace,
    shape,
    terms,
)
from gptq_compile.passes.manager import Pass
from gptq_compile.passes.program import Program

aten = torch.ops.aten
ops = torch.ops.gptq_compile


@dataclass(frozen=True)
class _Root:
    """``1 / sqrt(second moment of source + eps)``; the moment is about the mean when ``centered``."""

    source: Node
    eps: float
    centered: bool


class RaiseNorms(Pass):
    """See the module's rules."""

    name = "raise_norms"

    def run(self, program: Program) -> bool:
        changed = False
        for rule in (_raise_aten, _raise_spelled, _absorb_weights, _center, _absorb_bias):
            for node in list(program.graph.nodes):
                if node.op == "call_function" and node.users:  # without users it is dead, or was replaced
                    changed |= rule(program, node)
        return eliminate_dead(program) | changed


def _raise_aten(program: Program, node: Node) -> bool:
    if is_call(node, aten.layer_norm.default, aten.native_layer_norm.default):
        defaults: list[Any] = [None, None, 1e-5]
        x, normalized, weight, bias, eps = (list(node.args) + defaults[len(node.args) - 2 :])[:5]
        args: tuple[Any, ...] = (x, weight, bias, float(eps))
        target = ops.layer_norm.default
    elif is_call(node, aten.rms_norm.default, aten._fused_rms_norm.default):
        defaults = [None, None]
        x, normalized, weight, eps = list(node.args) + defaults[len(node.args) - 2 :]
        args = (x, weight, float(eps) if eps is not None else torch.finfo(dtype(x)).eps)
        target = ops.rms_norm.default
    else:
        return False
    if len(normalized) != 1:
        return False
    result = node
    if node.target in (aten.native_layer_norm.default, aten._fused_rms_norm.default):
        used = [u for u in node.users if u.users]
        if not used or any(not is_call(u, operator.getitem) or u.args[1] != 0 for u in used):
            return False
        result = used[0]
    with program.graph.inserting_before(node):
        new = program.call(target, args, like=node)
    result.replace_all_uses_with(new)
    return True


def _raise_spelled(program: Program, node: Node) -> bool:
    """``x * root``, ``(x * weight) * root`` or ``x / sqrt``: the normalized value."""
    candidates: list[tuple[Any, _Root | None]] = [(a, _root(b)) for a, b in factors(node)]
    if is_call(node, aten.div.Tensor) and not node.kwargs:
        candidates.append((node.args[0], _moment_plus_eps(_argument(node.args[1], aten.sqrt.default))))
    for x, root in candidates:
        if root is None or not is_node(x):
            continue
        for value, weight in [(x, None), *factors(x)]:
            if weight is not None and not _per_channel(weight, root.source):
                continue
            if not (value is root.source or (root.centered and _centered(value) is root.source)):
                continue
            with program.graph.inserting_before(node):
                if root.centered:
                    new = program.call(ops.layer_norm.default, (root.source, weight, None, root.eps), like=node)
                else:
                    new = program.call(ops.rms_norm.default, (root.source, weight, root.eps), like=node)
            replace(node, new)
            _strip_casts(program, new)
            return True
    return False


def _strip_casts(program: Program, norm: Node) -> None:
    """``cast(norm(cast(x, float32)), x.dtype)`` is ``norm(x)``: the op computes in float32 by itself."""
    cast = norm.args[0]
    if not is_call(cast, *CASTS) or dtype(cast) != torch.float32:
        return
    x: Any = cast.args[0]
    backs = list(norm.users)
    if not x.meta["val"].is_floating_point() or not all(is_call(u, *CASTS) and dtype(u) == dtype(x) for u in backs):
        return
    with norm.graph.inserting_before(norm):
        new = program.call(norm.target, (x, *norm.args[1:]), like=norm)
    for back in backs:
        replace(back, new)


def _absorb_weights(program: Program, node: Node) -> bool:
    for norm, factor in factors(node):
        if not is_call(norm, ops.rms_norm.default, ops.layer_norm.default) or len(norm.users) != 1:
            continue
        if norm.args[1] is not None or (norm.target is ops.layer_norm.default and norm.args[2] is not None):
            continue
        x, offset = norm.args[0], 0.0
        if not _per_channel(factor, x):
            plus = [(a, number(b)) for a, b in terms(factor)]
            found = [(a, b) for a, b in plus if b == 1.0 and _per_channel(a, x)]
            if not found or norm.target is not ops.rms_norm.default:
                continue
            factor, offset = found[0]
        rest = (norm.args[2],) if norm.target is ops.rms_norm.default else norm.args[2:]
        with program.graph.inserting_before(node):
            new = program.call(norm.target, (x, factor, *rest, *([offset] if offset else [])), like=norm)
        replace(node, new)
        return True
    return False


def _center(program: Program, node: Node) -> bool:
    """``rms_norm(x - mean(x))`` is ``layer_norm(x)``."""
    if not is_call(node, ops.rms_norm.default) or len(node.args) > 3:
        return False
    x, weight, eps = node.args
    source = _centered(x)
    if source is None:
        return False
    with program.graph.inserting_before(node):
        new = program.call(ops.layer_norm.default, (source, weight, None, eps), like=node)
    replace(node, new)
    return True


def _absorb_bias(program: Program, node: Node) -> bool:
    for norm, bias in terms(node):
        if not is_call(norm, ops.layer_norm.default) or len(norm.users) != 1 or norm.args[2] is not None:
            continue
        # Without a weight of its own, `norm + bias` could still be followed by the weight; then leave it.
        if not _per_channel(bias, norm.args[0]) or norm.args[1] is None:
            continue
        x, weight, _, eps = norm.args
        with program.graph.inserting_before(node):
            new = program.call(norm.target, (x, weight, bias, eps), like=norm)
        replace(node, new)
        return True
    return False


def _per_channel(node: Any, x: Any) -> bool:
    """Whether ``node`` is a parameter with one value per channel of ``x``."""
    return is_param(node) and rank(node) == 1 and shape(node)[0] == shape(x)[-1]


def _argument(node: Any, *targets: Any) -> Any:
    return node.args[0] if is_call(node, *targets) else None


def _root(node: Any) -> _Root | None:
    """Matches ``1 / sqrt(moment + eps)`` in its spellings."""
    inner = _argument(node, aten.rsqrt.default)
    if is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == -0.5:
        inner = node.args[0]
    elif is_call(node, aten.reciprocal.default):
        inner = _argument(node.args[0], aten.sqrt.default)
    elif is_call(node, aten.div.Tensor) and number(node.args[0]) == 1.0:
        inner = _argument(node.args[1], aten.sqrt.default)
    return _moment_plus_eps(inner)


def _moment_plus_eps(node: Any) -> _Root | None:
    if not is_node(node):
        return None
    for moment, eps in terms(node):
        value = number(eps)
        if value is None or value <= 0 or not is_node(moment):
            continue
        if (variance := _variance_of(moment)) is not None:
            return _Root(variance, value, True)
        square = _mean_of(moment)
        if square is None:
            continue
        source = _argument(square, aten.square.default)
        if (is_call(square, aten.mul.Tensor) and square.args[0] is square.args[1]) or (
            is_call(square, aten.pow.Tensor_Scalar) and square.args[1] == 2
        ):
            source = square.args[0]
        if is_node(source):
            return _Root(source, value, False)
    return None


def _mean_of(node: Any) -> Node | None:
    """``x`` if ``node`` is its mean over the last axis, which is kept."""
    if is_call(node, aten.mean.dim) and not node.kwargs and len(node.args) == 3 and node.args[2]:
        x, dims, _ = node.args
    elif is_call(node, aten.div.Tensor) and is_call(node.args[0], aten.sum.dim_IntList) and not node.args[0].kwargs:
        total = node.args[0]
        if len(total.args) != 3 or not total.args[2] or number(node.args[1]) != shape(total.args[0])[-1]:
            return None
        x, dims, _ = total.args
    else:
        return None
    return x if dims_arg(dims, rank(x)) == [rank(x) - 1] else None


def _variance_of(node: Node) -> Node | None:
    """``x`` if ``node`` is its biased variance over the last axis, which is kept."""
    if is_call(node, operator.getitem) and node.args[1] == 0 and is_call(node.args[0], aten.var_mean.correction):
        node = node.args[0]
    if not is_call(node, aten.var.correction, aten.var_mean.correction):
        return None
    x, *dims = node.args
    kept = node.kwargs.get("keepdim", False) and node.kwargs.get("correction") == 0
    last = dims_arg(dims[0] if dims else node.kwargs.get("dim"), rank(x)) == [rank(x) - 1]
    return x if kept and last else None


def _centered(node: Any) -> Node | None:
    """``x`` if ``node`` is ``x - mean(x)``."""
    if not is_call(node, aten.sub.Tensor) or node.kwargs:
        return None
    x, mean = node.args
    if is_call(mean, operator.getitem) and mean.args[1] == 1 and is_call(mean.args[0], aten.var_mean.correction):
        return x if _variance_of_pair(mean.args[0]) is x else None
    return x if _mean_of(mean) is x else None


def _variance_of_pair(pair: Node) -> Node | None:
    x = pair.args[0]
    last = dims_arg(pair.args[1] if len(pair.args) > 1 else pair.kwargs.get("dim"), rank(x)) == [rank(x) - 1]
    return x if last and pair.kwargs.get("keepdim") else None
