# SPDX-License-Identifier: Apache-2.0
"""Norms, rotary embeddings and gated activations of the dialect as one CUDA kernel each, and their derivatives.

What defines these ops (``dialect.REFERENCES``) is made of seven to ten operations on float32 copies: on 16-bit values a
norm moves ten times the bytes it has to, and a tape over it keeps the copies. Here values are read once, computed in
float32 and written once; the tape keeps what the caller had anyway. Parameters get no derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptq_compile.passes import dialect

ops = torch.ops.gptq_compile

_WIDEST = 32768  # features of a norm that one program holds
_TILE = 4096  # elements of a tile


@triton.jit
def _norm_kernel(
    x, weight, bias, grad, out, columns, eps, offset,
    CENTER: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, BACKWARD: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) / sqrt(var + eps) * (w + offset) + b, or with BACKWARD the derivative at x for one at y."""
    start = tl.program_id(0).to(tl.int64) * columns
    c = tl.arange(0, WIDTH)
    inside = c < columns
    v = tl.load(x + start + c, mask=inside, other=0.0).to(tl.float32)
    if CENTER:
        v = tl.where(inside, v - tl.sum(v, axis=0) / columns, 0.0)
    r = 1.0 / tl.sqrt(tl.sum(v * v, axis=0) / columns + eps)
    v = v * r
    y = v
    if BACKWARD:
        y = tl.load(grad + start + c, mask=inside, other=0.0).to(tl.float32)
    if WEIGHT:
        y = y * (tl.load(weight + c, mask=inside, other=0.0).to(tl.float32) + offset)
    if BACKWARD:
        along = tl.sum(y * v, axis=0) / columns
        if CENTER:
            y = y - tl.sum(y, axis=0) / columns
        y = (y - v * along) * r
    elif BIAS:
        y = y + tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start + c, y.to(out.dtype.element_ty), mask=inside)


def _norm_launch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, grad: Tensor | None, out: Tensor, options: tuple
) -> Tensor:
    eps, offset, center = options
    columns = x.shape[-1]
    with _on(x):
        _norm_kernel[(x.numel() // columns,)](
            x,
            x if weight is None else weight,
            x if bias is None else bias,
            x if grad is None else grad,
            out,
            columns,
            eps,
            offset,
            CENTER=center,
            WEIGHT=weight is not None,
            BIAS=bias is not None,
            BACKWARD=grad is not None,
            WIDTH=triton.next_power_of_2(columns),
            num_warps=4 if columns <= 4096 else 8,
        )
    return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, options: tuple, dtype: torch.dtype
    ) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.options = options
        return _norm_launch(x, weight, bias, None, torch.empty_like(x, dtype=dtype), options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return (
            _norm_launch(x, weight, None, grad.contiguous(), torch.empty_like(x), ctx.options),
            None,
            None,
            None,
            None,
        )


def _fits_norm(x: Tensor, *params: Tensor | None) -> bool:
    given = [p for p in params if p is not None]
    return (
        0 < x.shape[-1] <= _WIDEST
        and x.numel() > 0
        and all(p.shape == x.shape[-1:] and p.is_contiguous() and not p.requires_grad for p in given)
    )


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, weight_offset: float = 0.0, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """See ``dialect.rms_norm``."""
    if not _fits_norm(x, weight):
        return dialect.REFERENCES[ops.rms_norm.default](x, weight, eps, weight_offset, out_dtype=out_dtype)
    return _Norm.apply(x, weight, None, (eps, weight_offset, False), out_dtype or x.dtype)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """See ``dialect.layer_norm``."""
    if not _fits_norm(x, weight, bias):
        return dialect.REFERENCES[ops.layer_norm.default](x, weight, bias, eps, out_dtype=out_dtype)
    return _Norm.apply(x, weight, bias, (eps, 0.0, True), out_dtype or x.dtype)


@triton.jit
def _rotary_kernel(
    x, cos, sin, out, heads, size, rotary,
    INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """y_d = x_d cos_d -+ x_p sin_d with p the partner of d; BACKWARD: the transpose of that map."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, WIDTH)
    turns = d < rotary
    if INTERLEAVED:
        first = d % 2 == 0
        partner = tl.where(first, d + 1, d - 1)
    else:
        first = d < rotary // 2
        partner = tl.where(first, d + rotary // 2, d - rotary // 2)
    at = token * heads * size + h[:, None] * size
    live = (h < heads)[:, None] & (d < size)[None, :]
    v = tl.load(x + at + d[None, :], mask=live, other=0.0).to(tl.float32)
    p = tl.load(x + at + partner[None, :], mask=live & turns[None, :], other=0.0).to(tl.float32)
    c = tl.load(cos + token * rotary + d, mask=turns, other=1.0).to(tl.float32)
    if BACKWARD:
        s = tl.load(sin + token * rotary + partner, mask=turns, other=0.0).to(tl.float32)
        s = tl.where(first, s, -s)
    else:
        s = tl.load(sin + token * rotary + d, mask=turns, other=0.0).to(tl.float32)
        s = tl.where(first, -s, s)
    tl.store(out + at + d[None, :], (v * c[None, :] + p * s[None, :]).to(out.dtype.element_ty), mask=live)


def _rotary_launch(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, interleaved: bool, backward: bool) -> Tensor:
    heads, size = x.shape[-2:]
    width = triton.next_power_of_2(size)
    block = max(1, min(triton.next_power_of_2(heads), _TILE // width))
    with _on(x):
        _rotary_kernel[(x.numel() // (heads * size), triton.cdiv(heads, block))](
            x,
            cos,
            sin,
            out,
            heads,
            size,
            cos.shape[-1],
            INTERLEAVED=interleaved,
            BACKWARD=backward,
            HEADS=block,
            WIDTH=width,
            num_warps=4,
        )
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        x = x.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.dtype = interleaved, x.dtype
        return _rotary_launch(x, cos, sin, torch.empty_like(x, dtype=dtype), interleaved, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        grad = grad.contiguous()
        out = torch.empty_like(grad, dtype=ctx.dtype)
        return _rotary_launch(grad, cos, sin, out, ctx.interleaved, True), None, None, None, None


def rotary_embedding(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """See ``dialect.rotary_embedding``."""
    if (
        x.numel() == 0
        or cos.shape != sin.shape
        or cos.shape[:-1] != x.shape[:2]
        or cos.shape[-1] % 2
        or cos.requires_grad
        or sin.requires_grad
    ):
        call = dialect.REFERENCES[ops.rotary_embedding.default]
        return call(x, cos, sin, interleaved, out_dtype=out_dtype)
    return _Rotary.apply(x, cos.contiguous(), sin.contiguous(), interleaved, out_dtype or x.dtype)


@triton.jit
def _gated_kernel(
    gate, up, grad, out, out_gate, out_up, count,
    ACT: tl.constexpr, BACKWARD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    live = at < count
    g = tl.load(gate + at, mask=live, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=live, other=0.0).to(tl.float32)
    if ACT == "silu":
        s = 1.0 / (1.0 + tl.exp(-g))
        value = g * s
        slope = s * (1.0 + g * (1.0 - s))
    elif ACT == "gelu":
        s = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        value = g * s
        slope = s + g * tl.exp(-0.5 * g * g) * 0.3989422804014327
    elif ACT == "gelu_tanh":
        # (1 + tanh(z)) / 2 is the logistic function of 2 z
        s = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (g + 0.044715 * g * g * g)))
        value = g * s
        slope = s + g * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * g * g)
    else:
        value = tl.maximum(g, 0.0)
        slope = tl.where(g > 0, 1.0, 0.0)
    if BACKWARD:
        dy = tl.load(grad + at, mask=live, other=0.0).to(tl.float32)
        tl.store(out_gate + at, (dy * u * slope).to(out_gate.dtype.element_ty), mask=live)
        tl.store(out_up + at, (dy * value).to(out_up.dtype.element_ty), mask=live)
    else:
        tl.store(out + at, (value * u).to(out.dtype.element_ty), mask=live)


GATED = ("silu", "gelu", "gelu_tanh", "relu")


def _gated_launch(gate: Tensor, up: Tensor, grad: Tensor | None, outs: tuple[Tensor, ...], act: str) -> None:
    with _on(gate):
        _gated_kernel[(triton.cdiv(gate.numel(), _TILE),)](
            gate,
            up,
            gate if grad is None else grad,
            outs[0],
            outs[0],
            outs[-1],
            gate.numel(),
            ACT=act,
            BACKWARD=grad is not None,
            TILE=_TILE,
            num_warps=8,
        )


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: str, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.act = act
        out = torch.empty_like(gate, dtype=dtype)
        _gated_launch(gate, up, None, (out,), act)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        outs = torch.empty_like(gate), torch.empty_like(up)
        _gated_launch(gate, up, grad.contiguous(), outs, ctx.act)
        return *outs, None, None


def gated_act(gate: Tensor, up: Tensor, act: str, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """See ``dialect.gated_act``."""
    if act not in GATED or gate.shape != up.shape or gate.numel() == 0:
        return dialect.REFERENCES[ops.gated_act.default](gate, up, act, out_dtype=out_dtype)
    return _Gated.apply(gate, up, act, out_dtype or gate.dtype)


@triton.jit
def _loss_kernel(logits, labels, out, columns, TILE: tl.constexpr):
    """softmax(logits) - onehot(label) of one row; zeros where the label is negative."""
    row = tl.program_id(0).to(tl.int64)
    start = row * columns
    label = tl.load(labels + row)
    c = tl.arange(0, TILE)
    top = -3.0e38
    total = 0.0
    for begin in range(0, columns, TILE):
        v = tl.load(logits + start + begin + c, mask=begin + c < columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(v, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(v - higher), axis=0)
        top = higher
    share = tl.where(label < 0, 0.0, 1.0 / total)
    for begin in range(0, columns, TILE):
        k = begin + c
        v = tl.load(logits + start + k, mask=k < columns, other=float("-inf")).to(tl.float32)
        p = tl.exp(v - top) * share - tl.where(k == label, 1.0, 0.0)
        tl.store(out + start + k, p.to(out.dtype.element_ty), mask=k < columns)


def loss_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Derivative of the summed cross-entropy at logits ``[n, V]``, in their type; see ``gradients.loss_gradient``."""
    logits = logits.contiguous()
    out = torch.empty_like(logits)
    with _on(logits):
        _loss_kernel[(logits.shape[0],)](logits, labels, out, logits.shape[1], TILE=_TILE, num_warps=8)
    return out


FUSED: dict[Any, Callable[..., Tensor]] = {
    ops.rms_norm.default: rms_norm,
    ops.layer_norm.default: layer_norm,
    ops.rotary_embedding.default: rotary_embedding,
    ops.gated_act.default: gated_act,
}
"""Ops of the dialect -> the same, with derivatives, in one kernel."""


def _on(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()  # not CUDA: Triton's interpreter
