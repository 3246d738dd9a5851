# SPDX-License-Identifier: Apache-2.0
"""How attention becomes ONNX: ``GroupQueryAttention`` over past and present, or standard operators."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from gptq_compile.onnx.builder import MICROSOFT
from gptq_compile.onnx.lowering import BATCH, PAST, Lowering, ops, rule
from gptq_compile.passes.common import Node, shape

f32 = torch.float32
_HIDDEN = -1e30  # a score far below any; a row without a visible key must not become 0/0


@rule(ops.attention.default)
def _attention(c: Lowering, node: Node, a: SimpleNamespace) -> str:
    b, layer = c.b, len(c.layers)
    heads, dim = shape(a.q)[2:]
    kv_heads, v_dim = shape(a.k)[2], shape(a.v)[3]
    past = [
        b.input(f"past_key_values.{layer}.{kind}", np.float32, (BATCH, kv_heads, PAST, width))
        for kind, width in (("key", dim), ("value", v_dim))
    ]
    present = [f"present.{layer}.{kind}" for kind in ("key", "value")]
    c.layers.append((kv_heads, dim, v_dim))
    c.heads.append(heads)
    # The operator asks for one width of all heads, and on GPUs for a multiple of 8.
    if dim == v_dim and dim % 8 == 0:
        out = _grouped(c, a, heads, kv_heads, past, present)
    else:
        c.shared_buffer = False  # past and present are two tensors here
        out = _spelled_out(c, a, heads, kv_heads, past, present)
    return c.cast(c.reshape(out, *c.fixed_shape(node, -1)), f32, node.meta["val"].dtype)


def _grouped(c: Lowering, a: SimpleNamespace, heads: int, kv_heads: int, past: list[str], present: list[str]) -> str:
    b = c.b
    qkv = [b.node("Reshape", [c.operand(x, f32), c.batched(shape(x)[2] * shape(x)[3])]) for x in (a.q, a.k, a.v)]
    bias = "" if a.alibi_slopes is None else _alibi(c, a.alibi_slopes)
    sinks = "" if a.sinks is None else c.operand(a.sinks, f32)
    inputs = [*qkv, *past, _last_key(c), _total(c), "", "", "", bias, sinks]
    while not inputs[-1]:
        inputs.pop()
    out = b.unique(f"attention.{len(c.layers) - 1}")
    b.node(
        "GroupQueryAttention", inputs, [out, *present], domain=MICROSOFT, num_heads=heads, kv_num_heads=kv_heads,
        scale=float(a.scale), softcap=float(a.softcap) or None, local_window_size=a.window or None, do_rotary=0,
    )  # fmt: skip
    b.value(out, np.float32, (BATCH, "sequence_length", heads * shape(a.v)[3]))
    return out


def _last_key(c: Lowering) -> str:
    """int32 ``[batch]``: the last visible key of each sequence."""

    def make() -> str:
        b = c.b
        count = b.node("ReduceSum", ["attention_mask", b.ints(1)], keepdims=0)
        return b.node("Cast", [b.node("Sub", [count, b.ints(1)])], to=6)

    return c.once("last_key", make)


def _total(c: Lowering) -> str:
    """int32 scalar: :attr:`Lowering.total_length`."""
    return c.once("total", lambda: c.b.node("Cast", [c.b.node("Squeeze", [c.total_length])], to=6))


def _positions(c: Lowering) -> tuple[str, str]:
    """int64 ``[sequence, 1]`` and ``[total]``: which key each query is, and the keys."""

    def keys() -> str:
        b = c.b
        return b.node("Range", [b.constant(0, np.int64), b.node("Squeeze", [c.total_length]), b.constant(1, np.int64)])

    def queries() -> str:
        b = c.b
        length = b.node("Shape", ["input_ids"], start=1, end=2)
        first = b.node("Sub", [c.total_length, length])
        return b.node("Unsqueeze", [b.node("Slice", [all_keys, first, c.total_length, b.ints(0)]), b.ints(1)])

    all_keys = c.once("keys", keys)
    return c.once("queries", queries), all_keys


def _distance(c: Lowering) -> str:
    """int64 ``[sequence, total]``: how far back of its query a key lies."""
    queries, keys = _positions(c)
    return c.once("distance", lambda: c.b.node("Sub", [queries, keys]))


def _alibi(c: Lowering, slopes: Node) -> str:
    """float32 ``[1, heads, sequence, total]``: ``-slope * distance``."""

    def make() -> str:
        b = c.b
        away = b.node("Neg", [b.node("Cast", [_distance(c)], to=1)])
        return b.node("Mul", [c.reshape(c.operand(slopes, f32), 1, -1, 1, 1), away])

    return c.once(("alibi", slopes), make)


def _hidden(c: Lowering, window: int) -> str:
    """bool ``[batch, 1, sequence, total]``: which keys a query may not see."""

    def make() -> str:
        b = c.b
        hidden = b.node("Less", [_distance(c), b.constant(0, np.int64)])
        if window:
            hidden = b.node("Or", [hidden, b.node("GreaterOrEqual", [_distance(c), b.constant(window, np.int64)])])
        padding = b.node("Equal", ["attention_mask", b.constant(0, np.int64)])
        return b.node("Or", [b.node("Unsqueeze", [padding, b.ints(1, 2)]), hidden])

    return c.once(("hidden", window), make)


def _spelled_out(
    c: Lowering, a: SimpleNamespace, heads: int, kv_heads: int, past: list[str], present: list[str]
) -> str:
    b = c.b

    def by_head(x: Any) -> str:
        tokens = b.node("Reshape", [c.operand(x, f32), c.batched(*shape(x)[2:])])
        return b.node("Transpose", [tokens], perm=[0, 2, 1, 3])

    def for_queries(cache: str, width: int) -> str:
        if heads == kv_heads:
            return cache
        copies = b.node("Expand", [b.node("Unsqueeze", [cache, b.ints(2)]), b.ints(1, 1, heads // kv_heads, 1, 1)])
        return c.reshape(copies, 0, heads, -1, width)

    k, v = (
        for_queries(b.node("Concat", [old, by_head(x)], [new], axis=2), shape(x)[3])
        for old, x, new in zip(past, (a.k, a.v), present, strict=True)
    )
    scores = b.node("MatMul", [by_head(a.q), b.node("Transpose", [k], perm=[0, 1, 3, 2])])
    scores = b.node("Mul", [scores, b.constant(a.scale, np.float32)])
    if a.softcap > 0:
        cap = b.constant(a.softcap, np.float32)
        scores = b.node("Mul", [b.node("Tanh", [b.node("Div", [scores, cap])]), cap])
    if a.alibi_slopes is not None:
        scores = b.node("Add", [scores, _alibi(c, a.alibi_slopes)])
    scores = b.node("Where", [_hidden(c, a.window), b.constant(_HIDDEN, np.float32), scores])
    if a.sinks is not None:
        sink = c.reshape(c.operand(a.sinks, f32), 1, -1, 1, 1)
        rows = b.node("Concat", [c.batch_and_length, b.ints(1, 1)], axis=0)  # [batch, sequence, 1, 1]
        rows = b.node("Gather", [rows, b.ints(0, 2, 1, 3)])
        scores = b.node("Concat", [scores, b.node("Expand", [sink, rows])], axis=-1)
    probabilities = b.node("Softmax", [scores], axis=-1)
    if a.sinks is not None:
        probabilities = c.slice(probabilities, 0, -1, 1, 3)
    return b.node("Transpose", [b.node("MatMul", [probabilities, v])], perm=[0, 2, 1, 3])
