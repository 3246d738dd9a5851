# SPDX-License-Identifier: Apache-2.0
"""Proves that attention is the only op that mixes tokens.

Everything after ``insert_kv_cache`` rests on it: the n tokens of a call may belong to any number of sequences. The
proof is an abstract interpretation that follows the token dimension through every op: a value's element may depend on
no other token than its own. ``token_rules`` has the rules.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

import gptq_compile.passes.dialect_experts  # noqa: F401  registers ops
from gptq_compile.errors import PassError
from gptq_compile.passes import pattern
from gptq_compile.passes import token_rules as rules
from gptq_compile.passes.program import Program, where
from gptq_compile.passes.token_rules import Axes, MixesTokensError, TokenAxis

aten = torch.ops.aten
ops = torch.ops.gptq_compile


def check_token_parallel(program: Program) -> dict[fx.Node, TokenAxis]:
    """Checks that every op outside attention treats tokens independently.

    Returns:
        The token axis of every value that has one.

    Raises:
        PassError: naming the first op that mixes tokens, its module, source line and how it does.
    """
    axes: dict[fx.Node, TokenAxis] = {}
    for name in ("input_ids", "position_ids"):
        axes[program.input(name)] = TokenAxis(1)
    rows = program.input("logit_rows")
    for node in program.graph.nodes:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor | tuple | list):
            continue
        if node is program.output and node.target is aten.index_select.default and node.args[1:] == (1, rows):
            continue
        try:
            axis = _token_axis(program, node, axes)
        except MixesTokensError as e:
            raise PassError(
                f"{where(node)} mixes tokens: {e}. Only models in which attention alone mixes tokens can be compiled."
            ) from None
        if axis is not None:
            axes[node] = axis
    if (last := program.output).args[:1] and axes.get(last.args[0]) != TokenAxis(1):  # type: ignore[arg-type]
        raise PassError("The program's logits are not one row per token.")
    return axes


def _token_axis(program: Program, node: Any, axes: Axes) -> TokenAxis | None:
    """The token axis of ``node``'s value given those of its operands; None if it does not depend on tokens.

    Raises:
        MixesTokensError: in words, if an element of the value may depend on another token than its own.
    """
    known = {a: axes[a] for a in node.all_input_nodes if a in axes}
    if node.target in _FACTORIES:
        return _by_shape(program, node)
    if not known:
        dims = rules.token_dims(program, node)
        if not dims:
            return None
        if node.target in (aten.expand.default, aten.repeat.default, aten.broadcast_to.default):
            return _by_shape(program, node)
        raise MixesTokensError("its value depends on how many tokens there are, or on their order in the batch")
    rule = _RULES.get(node.target)
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        rule = rules.pointwise
    if rule is None:
        raise MixesTokensError(_WHY.get(_base_name(node), "it is not an op that is known to treat tokens separately"))
    axis = rule(program, node, axes)
    values = node.meta["val"]
    for value in values if isinstance(values, tuple | list) else [values]:
        if isinstance(value, Tensor) and axis is not None:
            _require_only_axis(program, value, axis)
    return axis


_WHY = {
    "conv1d": "convolution over the sequence",
    "convolution": "convolution over the sequence",
    "roll": "it shifts the sequence",
    "pad": "it pads or shifts the sequence",
    "cumsum": "a running sum over the sequence",
    "nonzero": "its shape depends on token values",
    "einsum": "einsum is not analysed",
    "flip": "it reverses a dimension",
    "while_loop": "recurrence over the sequence",
    "scan": "recurrence over the sequence",
}


def _base_name(node: fx.Node) -> str:
    return str(getattr(node.target, "_opname", getattr(node.target, "__name__", node.target)))


def _require_only_axis(program: Program, value: Tensor, axis: TokenAxis) -> None:
    n = pattern.token_symbol(program)
    dims = pattern.symbolic_dims(program, value)
    if dims != [axis.dim]:
        raise MixesTokensError(f"the number of tokens is in dimensions {dims} of its result instead of one")
    if rules.size(value, axis.dim) != axis.outer * axis.inner * n:
        raise MixesTokensError(f"it changes the number of tokens to {rules.size(value, axis.dim)}")


def _by_shape(program: Program, node: fx.Node) -> TokenAxis | None:
    """The axis of a value that is the same for all tokens."""
    dims = rules.token_dims(program, node)
    if not dims:
        return None
    if len(dims) > 1:
        raise MixesTokensError(f"the number of tokens is in dimensions {dims} of its result instead of one")
    n = pattern.token_symbol(program)
    count = rules.size(node.meta["val"], dims[0]) / n
    if not count.is_integer:
        raise MixesTokensError("its size is not a multiple of the number of tokens")
    return TokenAxis(dims[0], 1, int(count))


_FACTORIES = frozenset(
    {
        aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format,
        aten.scalar_tensor.default, *(pattern.SHAPE_ONLY - {aten.sym_size.int}),
    }
)  # fmt: skip

_RULES: dict[Any, Callable[..., TokenAxis | None]] = {
    operator.getitem: rules.same,
    **dict.fromkeys(
        (
            aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default,
            aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.flatten.using_ints, aten.unflatten.int,
        ), rules.view),
    **dict.fromkeys((aten.permute.default, aten.transpose.int, aten.t.default, aten.mT.default), rules.permute),
    **dict.fromkeys((aten.expand.default, aten.broadcast_to.default, aten.expand_as.default), rules.expand),
    aten.repeat.default: rules.repeat_rule,
    aten.repeat_interleave.self_int: rules.repeat_interleave,
    **dict.fromkeys(
        (*pattern.CASTS, aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default,
         aten.dropout.default, aten.lift_fresh_copy.default, aten.one_hot.default),
        rules.same),
    **dict.fromkeys(
        (aten.copy.default, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar,
         aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.logical_and.default, aten.logical_not.default,
         aten.logical_or.default, aten.clamp.Tensor, aten.float_power.Tensor_Scalar, aten.square.default,
         aten.log_sigmoid.default, aten.softplus.default, aten.prelu.default, aten.fill.Scalar, aten.rsub.Scalar,
         aten.gelu.default, aten.selu.default, aten.mish.default, aten.relu6.default, ops.gated_act.default,
         aten.true_divide.Tensor, aten.ne.Scalar, aten.polar.default, aten.view_as_complex.default),
        rules.pointwise),
    aten.slice.Tensor: rules.slice_rule,
    aten.narrow.default: rules.slice_rule,
    aten.select.int: rules.along("it takes one token by its place in the batch", drops=True),
    aten.unbind.int: rules.along("it splits the sequence", default=0, drops=True),
    **dict.fromkeys(
        (aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default),
        rules.along("it splits the sequence", dim_index=2, default=0)),
    **dict.fromkeys(
        (aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default),
        rules.along("a softmax over the sequence")),
    **dict.fromkeys((aten.cumsum.default, aten.cumprod.default), rules.along("a running sum over the sequence")),
    aten.topk.default: rules.along("it chooses among tokens", dim_index=2, default=-1),
    **dict.fromkeys((aten.sort.default, aten.argsort.default), rules.along("it sorts tokens", default=-1)),
    **dict.fromkeys((aten.slice_scatter.default,), rules.along("it overwrites tokens", dim_index=2, default=0)),
    aten.flip.default: rules.reduce("a reversal"),
    **dict.fromkeys(
        (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim,
         aten.argmax.default, aten.argmin.default, aten.prod.dim_int, aten.any.dim, aten.all.dim,
         aten.var.correction, aten.var.dim, aten.std.correction, aten.logsumexp.default, aten.sum.default,
         aten.mean.default, aten.max.default, aten.min.default, aten.any.default, aten.all.default),
        rules.reduce("a reduction")),
    aten.linalg_vector_norm.default: lambda p, n, a: rules.reduce("a norm")(p, rules.norm_args(n), a),
    **dict.fromkeys(
        (aten.linear.default, ops.quant_linear.default, ops.packed_linear.default), rules.linear),
    ops.expert_linear.default: rules.expert_linear(2),
    ops.quant_expert_linear.default: rules.expert_linear(4),
    ops.packed_expert_linear.default: rules.expert_linear(2),
    **dict.fromkeys((*rules.PRODUCTS, aten.addmm.default, aten.baddbmm.default), rules.matmul),
    **dict.fromkeys((aten.layer_norm.default, aten.native_layer_norm.default, aten.rms_norm.default), rules.layer_norm),
    **dict.fromkeys((ops.rms_norm.default, ops.layer_norm.default), rules.last_dim),
    ops.rotary_embedding.default: rules.same,
    aten.embedding.default: rules.embedding,
    aten.index_select.default: rules.index_select,
    **dict.fromkeys((aten.gather.default, aten.scatter.src, aten.scatter.value, aten.scatter_add.default,
                     aten.scatter.value_reduce), rules.gather),
    aten.index.Tensor: rules.index_rule,
    aten.cat.default: rules.cat,
    aten.stack.default: rules.stack,
    **dict.fromkeys((aten.constant_pad_nd.default, aten.pad.default), rules.pad),
    ops.attention.default: rules.attention,
}  # fmt: skip
