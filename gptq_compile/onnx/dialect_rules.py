# SPDX-License-Identifier: Apache-2.0
"""How the IR's own ops but attention become ONNX: norms, rotary embeddings, gated activations, quantized linears."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import gptq_compile.onnx.attention_rules  # noqa: F401  registers its rules
from gptq_compile.errors import PassError
from gptq_compile.onnx.builder import MICROSOFT
from gptq_compile.onnx.grid import Grid
from gptq_compile.onnx.lowering import Lowering, aten, ops, rule
from gptq_compile.passes.common import Node, is_call, is_node, number, shape
from gptq_compile.passes.program import where

f32 = torch.float32


def activation(c: Lowering, act: str, x: str) -> str:
    """An activation of ``dialect.ACTIVATIONS`` on a float32 value."""
    b = c.b
    if act == "silu":
        return b.node("Mul", [x, b.node("Sigmoid", [x])])
    if act in ("gelu", "gelu_tanh"):
        return b.node("Gelu", [x], approximate="tanh" if act == "gelu_tanh" else "none")
    if act == "relu2":
        positive = b.node("Relu", [x])
        return b.node("Mul", [positive, positive])
    return b.node({"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}[act], [x])


@rule(ops.rms_norm.default)
def _rms_norm(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    # These six nodes are what ONNX Runtime fuses into SimplifiedLayerNormalization, an operator that no standard has.
    b = c.b
    x = c.operand(a.x, f32)
    mean = b.node("ReduceMean", [b.node("Pow", [x, b.constant(2, np.float32)]), b.ints(-1)], keepdims=1)
    root = b.node("Sqrt", [b.node("Add", [mean, b.constant(a.eps, np.float32)])])
    out = b.node("Div", [x, root])
    if a.weight is not None:
        weight = c.operand(a.weight, f32)
        if a.weight_offset:
            offset = b.constant(a.weight_offset, np.float32)
            weight = c.once(("offset", weight, a.weight_offset), lambda: b.node("Add", [weight, offset]))
        out = b.node("Mul", [out, weight])
    return c.cast(out, f32, node.meta["val"].dtype)


@rule(ops.layer_norm.default)
def _layer_norm(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    width = shape(a.x)[-1]
    ones = c.b.constant(np.ones(width, np.float32)) if a.weight is None else c.operand(a.weight, f32)
    inputs = [c.operand(a.x, f32), ones, *([] if a.bias is None else [c.operand(a.bias, f32)])]
    out = c.b.node("LayerNormalization", inputs, axis=-1, epsilon=a.eps)
    return c.cast(out, f32, node.meta["val"].dtype)


@rule(ops.gated_act.default)
def _gated_act(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    out = c.b.node("Mul", [activation(c, a.act, c.operand(a.gate, f32)), c.operand(a.up, f32)])
    return c.cast(out, f32, node.meta["val"].dtype)


@rule(ops.rotary_embedding.default)
def _rotary_embedding(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    b = c.b
    heads, dim = shape(a.x)[2:]
    r = shape(a.cos)[-1]
    x, cos, sin = (c.operand(v, f32) for v in (a.x, a.cos, a.sin))
    if mirrored(a.cos, a.interleaved) and mirrored(a.sin, a.interleaved):
        tables = [
            c.once(("half", t, a.interleaved), functools.partial(_half, c, t, r, a.interleaved)) for t in (cos, sin)
        ]
        # Row i of the tables belongs to token i, whatever its position.
        inputs = [c.reshape(x, 1, -1, heads * dim), b.ints(0), *tables]
        out = b.node(
            "RotaryEmbedding", inputs, domain=MICROSOFT, interleaved=int(a.interleaved), num_heads=heads,
            rotary_embedding_dim=0 if r == dim else r,
        )  # fmt: skip
        b.value(out, np.float32, (1, "tokens", heads * dim))
        return c.cast(c.reshape(out, 1, -1, heads, dim), f32, node.meta["val"].dtype)
    head = x if r == dim else c.slice(x, 0, r, 1, 3)
    cos, sin = (b.node("Unsqueeze", [t, b.ints(2)]) for t in (cos, sin))
    if a.interleaved:
        pairs = c.reshape(head, 1, -1, heads, r // 2, 2)
        odd, even = c.slice(pairs, 1, 2, 1, 4), c.slice(pairs, 0, 1, 1, 4)
        turned = c.reshape(b.node("Concat", [b.node("Neg", [odd]), even], axis=-1), 1, -1, heads, r)
    else:
        low, high = c.slice(head, 0, r // 2, 1, 3), c.slice(head, r // 2, r, 1, 3)
        turned = b.node("Concat", [b.node("Neg", [high]), low], axis=-1)
    out = b.node("Add", [b.node("Mul", [head, cos]), b.node("Mul", [turned, sin])])
    if r != dim:
        out = b.node("Concat", [out, c.slice(x, r, dim, 1, 3)], axis=-1)
    return c.cast(out, f32, node.meta["val"].dtype)


def mirrored(node: Any, interleaved: bool) -> bool:
    """Whether both features of every rotated pair provably have the same value in a table ``[1, n, r]``."""
    if is_call(node, aten.cat.default):
        pieces = node.args[0]
        axis = node.args[1] if len(node.args) > 1 else 0
        return not interleaved and len(pieces) == 2 and pieces[0] is pieces[1] and axis in (-1, len(shape(node)) - 1)
    if is_call(node, aten.repeat_interleave.self_int):
        last = (-1, len(shape(node)) - 1)
        return interleaved and node.args[1] == 2 and len(node.args) > 2 and node.args[2] in last
    if is_call(node, aten.cos.default, aten.sin.default, aten._to_copy.default, aten.to.dtype):
        return mirrored(node.args[0], interleaved)
    if is_call(node, aten.mul.Tensor):
        return number(node.args[1]) is not None and mirrored(node.args[0], interleaved)
    return False


def _half(c: Lowering, table: str, width: int, interleaved: bool) -> str:
    """``[n, width / 2]``: one value a pair."""
    half = c.slice(table, 0, width, 2, 2) if interleaved else c.slice(table, 0, width // 2, 1, 2)
    return c.reshape(half, -1, width // 2)


@rule(ops.quant_linear.default)
def _quant_linear(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    params = c.program.params
    codes, names = tensors_of(a)
    rows, columns = params.shape(codes)
    g_idx = None if a.g_idx is None else params.get(a.g_idx.meta["param"]).numpy()

    def read() -> Any:
        return tuple(None if name is None else params.get(name).numpy() for name in names)

    base = codes.removesuffix(".codes")
    grid = Grid(base, rows, columns, a.bits, a.group_size, g_idx, a.zeros is not None, read)
    bias = "" if a.bias is None else c.operand(a.bias, f32)
    pieces = stretches(node, rows) if c.product.divides else []
    made = c.product(c, c.operand(a.x, f32), grid, bias, [size for _, size in pieces] or [rows])
    made = tuple(c.cast(out, f32, node.meta["val"].dtype) for out in made)
    for (reader, size), out in zip(pieces, made, strict=False):
        c.b.value(out, np.float32, (*c.shape(reader)[:-1], size))
        c.divided[reader] = out
    return made[0]


def tensors_of(a: SimpleNamespace) -> tuple[str, list[str | None]]:
    """The name of a quantized linear's codes; and of codes, scales and, if there are any, zero points."""
    return a.codes.meta["param"], [None if n is None else n.meta["param"] for n in (a.codes, a.scales, a.zeros)]


def stretches(node: Node, rows: int) -> list[tuple[Node, int]]:
    """The slices of features, side by side, that are all that reads a linear, in order with their sizes; else none."""
    found = []
    for user in node.users:
        if not is_call(user, aten.slice.Tensor) or len(user.args) != 4 or user.args[1] != len(shape(node)) - 1:
            return []
        found.append((user.args[2], user.args[3], user))
    found.sort(key=lambda piece: piece[0])
    edges = [0, *(stop for _, stop, _ in found)]
    together = len(found) > 1 and edges[-1] == rows and all(f[0] == e for f, e in zip(found, edges, strict=False))
    return [(user, stop - start) for start, stop, user in found] if together else []


@rule(ops.quant_expert_linear.default)
def _quant_expert_linear(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    """Each expert on the rows routed to it; experts without rows multiply nothing."""
    b, params = c.b, c.program.params
    codes, names = tensors_of(a)
    base = codes.removesuffix(".codes")
    experts, rows, columns = params.shape(codes)
    x = c.reshape(c.operand(a.x, f32), -1, columns)

    def read(e: int) -> Any:
        return tuple(None if name is None else params.get(name)[e].numpy() for name in names)

    def multiply(e: int, chosen: str) -> str:
        bias = "" if a.bias is None else b.node("Gather", [c.operand(a.bias, f32), b.constant(e, np.int64)], axis=0)
        part = functools.partial(read, e)
        grid = Grid(f"{base}.{e}", rows, columns, a.bits, a.group_size, None, a.zeros is not None, part)
        (out,) = c.product(c, chosen, grid, bias, [rows])
        b.value(out, np.float32, (f"rows_of_{out}", rows))  # one name for all would let buffers be shared
        return out

    return _by_expert(c, node, x, a.expert, experts, rows, multiply)


@rule(ops.expert_linear.default)
def _expert_linear(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    b = c.b
    weight = c.operand(a.weight, f32)
    experts, rows = shape(a.weight)[0], shape(a.weight)[-1 if a.transposed else 1]
    x = c.reshape(c.operand(a.x, f32), -1, shape(a.x)[-1])

    def multiply(e: int, chosen: str) -> str:
        number = b.constant(e, np.int64)
        inputs = [chosen, b.node("Gather", [weight, number], axis=0)]
        if a.bias is not None:
            inputs.append(b.node("Gather", [c.operand(a.bias, f32), number], axis=0))
        return b.node("Gemm", inputs, transB=int(not a.transposed))

    return _by_expert(c, node, x, a.expert, experts, rows, multiply)


def _by_expert(c: Lowering, node: Node, x: str, expert: Any, experts: int, rows: int, multiply: Any) -> str:
    b = c.b
    if not is_node(expert):
        raise PassError(f"{where(node)} has no tensor that says which expert a row goes to.")
    ids = c.reshape(c.value(expert), -1)
    count = b.node("Shape", [x], start=0, end=1)
    out = b.node("Expand", [b.constant(0, np.float32), b.node("Concat", [count, b.ints(rows)], axis=0)])
    for e in range(experts):
        chosen = b.node("NonZero", [b.node("Equal", [ids, b.constant(e, np.int64)])])
        chosen = b.node("Transpose", [chosen], perm=[1, 0])
        made = multiply(e, b.node("GatherND", [x, chosen]))
        out = b.node("ScatterND", [out, chosen, made])
    return c.cast(c.reshape(out, *c.fixed_shape(node, -1)), f32, node.meta["val"].dtype)
