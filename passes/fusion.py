# SPDX-License-Identifier: Apache-2.0
"""Which nodes of a program one kernel computes together, decided when an entry is lowered.

A group is emitted in the place of its last node and reads only the group's inputs; what is in between is not lowered
unless something else needs it. Groups are found by what values mean, never by the model:

* a packed linear, with the norm, gated activation or activation that makes its input, if no one else reads that, and
  with the addition of its result to a float32 stream or the gated activation of its two halves (``fused_linear``);
* attention of a decode step, with rotary embeddings and the cache append (``decode_attention``);
* a gated activation whose factors are stretches of one tensor, and rotary embeddings of heads that are one.

Each is taken only where a kernel of the target accepts the case; otherwise the parts are lowered one by one.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

from gptq_compile.errors import NoKernelError
from gptq_compile.kernels.registry import Case, select
from gptq_compile.kernels.target import Target
from gptq_compile.passes.common import Node, dtype, feature_slice, is_call, is_param, same_shape, shape, with_defaults
from gptq_compile.passes.dialect import packed_case
from gptq_compile.passes.evaluate import PAGE_SIZE
from gptq_compile.passes.program import Program

ops = torch.ops.gptq_compile
aten = torch.ops.aten

_ACTIVATIONS = {
    aten.relu.default: "relu",
    aten.silu.default: "silu",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
}
_ROWS = (aten.reshape.default, aten.view.default)


@dataclass(frozen=True)
class Group:
    """Nodes that one kernel computes.

    Attributes:
        node: the last of them; the kernel's result is its value.
        case: what the kernel computes.
        arguments: the values that are passed, in the kernel's order. Those in ``flat`` as rows ``[n, width]``.
        flat: the arguments that are passed as rows.
        inside: the nodes that nobody else may read.
        inplace: indices of arguments that the kernel writes.
    """

    node: Node
    case: Case
    arguments: tuple[Node, ...]
    flat: frozenset[Node]
    inside: tuple[Node, ...] = ()
    inplace: tuple[int, ...] = ()


Count = Callable[[Node], int | None]
"""How many rows a value has in an entry: all its axes but the last. None if that is not known at compile time."""


Refusals = MutableMapping[str, dict[str, str]]
"""Case -> kernel -> why it refused, of what could not be computed together."""


def plan(
    program: Program, target: Target, batch: int | None, count: Count, refused: Refusals | None = None
) -> dict[Node, Group]:
    """The groups of an entry by the node in whose place they are emitted.

    Args:
        program: a paged, packed program.
        target: whose kernels are asked.
        batch: tokens of a decode step, each of a sequence of its own; None for any tokens.
        count: rows of a value in this entry.
        refused: is told why kernels refused groups.
    """
    takes = _Taker(target, {} if refused is None else refused)
    groups: dict[Node, Group] = {}
    for node in program.graph.nodes:
        group = None
        if is_call(node, ops.gated_act.default):
            group = _gated(node, count(node), takes)
        elif is_call(node, ops.rotary_embedding.default):
            group = _rotary(node, count(node.args[1]), takes)
        elif is_call(node, ops.paged_attention.default) and batch is not None:
            group = _decode_attention(program, node, batch, takes)
        if group is not None:
            groups[node] = group
    return groups | _linears(program, count, takes)


def needed(program: Program, groups: dict[Node, Group]) -> set[Node]:
    """The nodes whose values somebody reads when groups are emitted as one."""
    found: set[Node] = {program.output}
    for node in reversed(list(program.graph.nodes)):
        if node in found:
            group = groups.get(node)
            found.update((stored(i) for i in node.all_input_nodes) if group is None else group.arguments)
    return found


def stored(node: Node) -> Node:
    """What a kernel reads for a linear's weight: the parameter, also where the program widens it first."""
    widened = is_call(node, aten._to_copy.default) and all(is_call(u, aten.linear.default) for u in node.users)
    return node.args[0] if widened and is_param(node.args[0]) else node


class _Taker:
    """Whether some kernel accepts a case; remembers why not."""

    def __init__(self, target: Target, refused: Refusals) -> None:
        self.target, self.refused = target, refused

    def __call__(self, case: Case) -> bool:
        try:
            select(case, self.target)
        except NoKernelError as error:
            if error.refused:  # else the target has no kernels of that op at all
                self.refused[str(case)] = dict(error.refused)
            return False
        return True


def stretch(node: Node) -> tuple[Node, int]:
    """``(source, first)``: the tensor of which the last axis of ``node`` is a stretch, and where that begins."""
    first = 0
    while (piece := feature_slice(node)) is not None and piece[3] == 1:
        node, first = piece[0], first + piece[1]
    return node, first


def heads(node: Node) -> tuple[Node, int, int, int]:
    """``(source, width, first, apart)`` of heads ``[1, n, H, D]``: feature d of head h is at ``first + h apart + d``.

    ``source`` is a tensor whose rows have ``width`` features, before any cast from float32: who reads it rounds.
    """
    count = int(shape(node)[2])
    inner, first = stretch(node)
    apart = int(shape(inner)[-1])
    if is_call(inner, *_ROWS) and len(shape(inner.args[0])) == 3 and int(shape(inner.args[0])[-1]) == count * apart:
        row = inner.args[0]
        if is_call(row, aten._to_copy.default) and dtype(row.args[0]) == torch.float32:
            row = row.args[0]
        source, before = stretch(row)
        return source, int(shape(source)[-1]), before + first, apart
    return inner, count * apart, first, apart


def _gated(node: Node, rows: int | None, takes: _Taker) -> Group | None:
    gate, up, act = node.args
    (gate_source, at), (up_source, up_at) = stretch(gate), stretch(up)
    if dtype(gate_source) != dtype(up_source) or (gate_source is gate and up_source is up):
        return None
    case = Case.make(
        "gated_act", _name(gate), rows, features=int(shape(gate)[-1]), act=act, out_dtype=_name(node),
        width=int(shape(gate_source)[-1]), at=at, up_width=int(shape(up_source)[-1]), up_at=up_at,
    )  # fmt: skip
    if not takes(case):
        return None
    return Group(node, case, (gate_source, up_source), frozenset((gate_source, up_source)))


def _rotary(node: Node, rows: int | None, takes: _Taker) -> Group | None:
    x, *tables = node.args[:3]
    source, width, at, apart = heads(x)
    if source is x:
        return None
    count, dim = (int(d) for d in shape(x)[-2:])
    case = Case.make(
        "rotary_embedding", _name(source), rows, heads=count, head_dim=dim, rotary_dim=int(shape(tables[0])[-1]),
        interleaved=bool(node.args[3]) if len(node.args) > 3 else False, table_dtype=_name(tables[0]),
        out_dtype=_name(node), width=width, at=at, apart=apart,
    )  # fmt: skip
    return Group(node, case, (source, *tables), frozenset((source, *tables))) if takes(case) else None


def _decode_attention(program: Program, node: Node, rows: int, takes: _Taker) -> Group | None:
    q, k, v, k_cache, v_cache, _, sequences, slots, page_table, scale, *rest = node.args
    window, softcap, sinks, alibi = with_defaults(rest, [0, 0.0, None, None])
    tables: tuple[Node, ...] = ()
    turn: dict[str, Any] = {"rotary_dim": 0}
    if is_call(q, ops.rotary_embedding.default) and is_call(k, ops.rotary_embedding.default):
        if q.args[1:] != k.args[1:] or dtype(q) != dtype(k):
            return None
        tables = tuple(q.args[1:3])
        turn = {"rotary_dim": int(shape(q.args[1])[-1]), "interleaved": bool(q.args[3]) if len(q.args) > 3 else False}
        if any(dtype(t) != torch.float32 for t in tables):
            return None
        q, k = q.args[0], k.args[0]
    places: dict[str, Any] = {}
    sources = []
    for key, value in (("q", q), ("k", k), ("v", v)):
        source, width, first, apart = heads(value)
        sources.append(source)
        places |= {f"{key}_width": width, f"{key}_at": first, f"{key}_head": apart}
    if len({dtype(s) for s in sources}) > 1 or any(dtype(e) != torch.float32 for e in (sinks, alibi) if e is not None):
        return None
    kv_heads, v_dim = (int(d) for d in shape(v)[-2:])
    query_heads, dim = (int(d) for d in shape(q)[-2:])
    case = Case.make(
        "decode_attention", _name(k_cache), rows, heads=query_heads, kv_heads=kv_heads, head_dim=dim, v_head_dim=v_dim,
        page_size=PAGE_SIZE, scale=float(scale), window=int(window), softcap=float(softcap),
        has_sinks=sinks is not None, has_alibi=alibi is not None, input_dtype=_name(sources[0]), **turn, **places,
    )  # fmt: skip
    if not takes(case):
        return None
    extra = [e for e in (sinks, alibi) if e is not None]
    arguments = (
        *sources,
        *tables,
        program.input("position_ids"),
        slots,
        sequences,
        page_table,
        k_cache,
        v_cache,
        *extra,
    )
    at = len(sources) + len(tables) + 4
    return Group(node, case, arguments, frozenset((*sources, *tables)), inplace=(at, at + 1))


def _linears(program: Program, count: Count, takes: _Taker) -> dict[Node, Group]:
    found: list[tuple[Node, Group, Node | None]] = []
    gates: set[Node] = set()  # gated activations that come out of the linear in front of them
    for node in program.graph.nodes:
        if not is_call(node, ops.packed_linear.default):
            continue
        made = _input(node.args[0])
        if made is not None and made.node in gates:
            made = None
        gated, rows = _gates(node), count(node)
        group = _linear(node, rows, made, gated)
        if made is not None and not takes(group.case):
            plain = _linear(node, rows, made)
            # What makes the input is worth more than what follows.
            made, gated = (made, None) if takes(plain.case) else (None, gated)
            group = _linear(node, rows, made, gated)
        if gated is not None and not takes(group.case):
            gated, group = None, _linear(node, rows, made)
        if group.case.op == "fused_linear" and takes(group.case):
            found.append((node, group, gated))
            gates.update([gated] if gated is not None else [])
    # What makes the input of several linears is only computed inside of them if that holds for all.
    inside = {linear: group.inside[0] for linear, group, _ in found if group.inside}
    apart = {made for made in inside.values() if any(inside.get(user) is not made for user in made.users)}
    groups = {}
    for linear, group, gated in found:
        if group.inside and group.inside[0] in apart:
            group = _linear(linear, count(linear), None, gated)
            if group.case.op != "fused_linear" or not takes(group.case):
                group = _linear(linear, count(linear), None)
            if group.case.op != "fused_linear" or not takes(group.case):
                continue
        groups[group.node] = group
    return groups


def _gates(node: Node) -> Node | None:
    """The gated activation whose gate and other factor are the two halves of a product, if nothing else reads that."""
    last, residual = _added(node)
    readers, queue = set(), list(last.users)
    while queue:
        user = queue.pop()
        if feature_slice(user) is not None:
            queue += user.users
        else:
            readers.add(user)
    if residual is not None or len(readers) != 1:
        return None
    (gated,) = readers
    if not is_call(gated, ops.gated_act.default):
        return None
    features = int(shape(gated)[-1])
    halves = stretch(gated.args[0]) == (last, 0) and stretch(gated.args[1]) == (last, features)
    return gated if halves and int(shape(last)[-1]) == 2 * features else None


@dataclass(frozen=True)
class _Made:
    """How the input of a linear is made: the node, the kernel's attributes, and the tensors it reads."""

    node: Node
    attrs: dict[str, Any]
    rows: tuple[Node, ...]
    parameters: tuple[Node, ...] = ()


def _input(x: Node) -> _Made | None:
    if is_call(x, ops.rms_norm.default, ops.layer_norm.default):
        rms = is_call(x, ops.rms_norm.default)
        source, weight, *more = x.args
        bias = None if rms else more.pop(0)
        parameters = [p for p in (weight, bias) if p is not None]
        if any(dtype(p) != torch.float32 or not is_param(p) for p in parameters):
            return None
        attrs = {"input": "rms_norm" if rms else "layer_norm", "input_dtype": _name(source), "eps": float(more[0])}
        attrs |= {"weight_offset": float(more[1]) if len(more) > 1 else 0.0}
        attrs |= {"has_norm_weight": weight is not None, "has_norm_bias": bias is not None}
        return _Made(x, attrs, (source,), tuple(parameters))
    if is_call(x, ops.gated_act.default):
        gate, up, act = x.args
        (source, at), (other, up_at) = stretch(gate), stretch(up)
        attrs = {"input": "gated", "act": act, "input_dtype": _name(source), "at": at, "up_at": up_at}
        attrs |= {"width": int(shape(source)[-1]), "up_width": int(shape(other)[-1])}
        return _Made(x, attrs, (source, other)) if dtype(source) == dtype(other) else None
    act = _ACTIVATIONS.get(x.target) if x.op == "call_function" else None
    if is_call(x, aten.gelu.default):
        act = "gelu_tanh" if x.kwargs.get("approximate", "none") == "tanh" else "gelu"
    if act is None:
        return None
    return _Made(x, {"input": "activated", "act": act, "input_dtype": _name(x.args[0])}, (x.args[0],))


def _linear(node: Node, rows: int | None, made: _Made | None, gated: Node | None = None) -> Group:
    """The group of a packed linear: a plain ``quant_linear`` if nothing comes together with it."""
    x, packed, bias, _, _, bits, group_size, out_features, has_zeros = node.args
    last, residual = _added(node)
    if gated is not None:
        last = gated
    if made is not None and dtype(x) not in (torch.float16, torch.bfloat16):
        made = None
    case = packed_case(
        bits, group_size, int(shape(x)[-1]), out_features, has_zeros, bias is not None, _name(x), rows, _name(last)
    )
    sources = (x,) if made is None else made.rows
    parameters = () if made is None else made.parameters
    extra = [e for e in (bias, residual) if e is not None]
    if made is not None or residual is not None or gated is not None:
        attrs = {} if made is None else dict(made.attrs)
        attrs |= {} if gated is None else {"out_act": gated.args[2]}
        case = Case.make(
            "fused_linear", case.dtype, rows, **dict(case.attrs), has_residual=residual is not None, **attrs
        )
    flat = frozenset((*sources, *([residual] if residual is not None else [])))
    inside = () if made is None else (made.node,)
    return Group(last, case, (*sources, *parameters, *packed, *extra), flat, inside)


def _added(node: Node) -> tuple[Node, Node | None]:
    """``(last, residual)``: the addition to a float32 stream that is all that reads a product, and what it adds to.

    ``(cast, None)`` if all that reads it is a cast to float32, and ``(node, None)`` otherwise.
    """
    users = list(node.users)
    if len(users) != 1 or not is_call(users[0], aten._to_copy.default) or dtype(users[0]) != torch.float32:
        return node, None
    cast = users[0]
    readers = list(cast.users)
    if len(readers) == 1 and is_call(readers[0], aten.add.Tensor) and not readers[0].kwargs:
        total = readers[0]
        a, b = total.args
        other = b if a is cast else a
        varies = isinstance(other, torch.fx.Node) and other is not cast and not is_param(other)
        if varies and dtype(other) == torch.float32 and same_shape(other, total) and same_shape(cast, total):
            return total, other
    return cast, None


def emit(entry: Any, group: Group) -> Any:
    """Emits a group's kernel in an entry; returns the value of its last node."""
    from gptq_compile.kernels.tvm_env import relax

    arguments = [entry.whole_rows(n) if n in group.flat else entry.argument(n) for n in group.arguments]
    by_heads = group.case.op in ("decode_attention", "rotary_embedding")
    last = [int(d) for d in shape(group.node)[-2 if by_heads else -1 :]]
    rows = entry.leading(group.node, len(last))
    out = relax.TensorType([rows, *last], _name(group.node))
    function = entry.kernels.function(group.case)
    if not group.inplace:
        return entry.shaped(entry.builder.emit(relax.call_tir(function, arguments, out)), group.node)
    outs = [*(arguments[i].ty for i in group.inplace), out]
    value = entry.builder.emit(relax.call_tir_inplace(function, arguments, [*group.inplace, -1], outs))
    return entry.shaped(entry.builder.emit(relax.TupleGetItem(value, len(group.inplace))), group.node)


def _name(node: Node) -> str:
    return str(dtype(node)).removeprefix("torch.")
