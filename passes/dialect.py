# SPDX-License-Identifier: Apache-2.0
"""The IR's own ops, ``torch.ops.gptq_compile.*``: each with a shape function and an eager reference.

The IR is a ``torch.export`` graph over ATen plus these ops. Because every op has a reference, a program can be run
after any pass; the pass manager validates passes by running the program before and after (translation validation).

Layouts are token-major: activations are ``[1, n, channels]`` and attention heads ``[1, n, heads, head_dim]``, where
``n`` is the number of tokens. Importing this module registers the ops once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptq_compile.passes import cache_rows

NAMESPACE = "gptq_compile"
_QUERY_BLOCK = 256  # queries handled at once by the reference attention: bounds its [heads, block, n] scores

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def attention_scores(
    q: Tensor,
    k: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    scale: float,
    window: int,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """Masked attention logits of one sequence.

    Args:
        q: ``[m, heads, head_dim]`` queries.
        k: ``[n, kv_heads, head_dim]`` keys; query head ``h`` reads key head ``h // (heads / kv_heads)``.
        q_pos: ``[m]`` positions of the queries. ``k_pos``: ``[n]`` positions of the keys.
        scale: factor on ``q . k``.
        window: a query sees keys at most ``window - 1`` positions back; 0 means all.
        softcap: ``softcap * tanh(scores / softcap)`` when positive (Gemma 2).
        alibi_slopes: ``[heads]``; adds ``slope * (k_pos - q_pos)`` (arXiv 2108.12409).

    Returns:
        ``[heads, m, n]`` float32, minus infinity where a query may not look.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    qf = q.float().transpose(0, 1).reshape(kv_heads, heads // kv_heads, q.shape[0], q.shape[2])
    scores = (qf @ k.float().permute(1, 2, 0).unsqueeze(1)).reshape(heads, q.shape[0], k.shape[0]) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    distance = q_pos[:, None] - k_pos[None, :]
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.float()[:, None, None] * distance
    hidden = distance < 0
    if window > 0:
        hidden = hidden | (distance >= window)
    return scores.masked_fill(hidden, float("-inf"))


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last axis of ``[heads, m, n]``; ``sinks[heads]`` is one more logit that carries no value."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    extra = sinks.float()[:, None, None].expand(*scores.shape[:2], 1)
    return torch.softmax(torch.cat([scores, extra], dim=-1), dim=-1)[..., :-1]


def _attend(q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor, opts: tuple) -> Tensor:
    """Reference attention of one sequence; ``opts`` = (scale, window, softcap, sinks, alibi_slopes)."""
    scale, window, softcap, sinks, alibi = opts
    heads, kv_heads = q.shape[1], k.shape[1]
    values = v.float().transpose(0, 1).unsqueeze(1)
    out = q.new_empty((q.shape[0], heads, v.shape[2]))
    for start in range(0, q.shape[0], _QUERY_BLOCK):
        rows = slice(start, start + _QUERY_BLOCK)
        probs = softmax_with_sinks(
            attention_scores(q[rows], k, q_pos[rows], k_pos, scale, window, softcap, alibi), sinks
        )
        mixed = probs.reshape(kv_heads, heads // kv_heads, *probs.shape[1:]) @ values
        out[rows] = mixed.reshape(heads, probs.shape[1], -1).transpose(0, 1).to(q.dtype)
    return out


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Causal self-attention over one whole sequence, before any GQA expansion or mask.

    Shapes: q ``[1, n, heads, head_dim]``, k ``[1, n, kv_heads, head_dim]``, v ``[1, n, kv_heads, v_head_dim]``,
    result ``[1, n, heads, v_head_dim]``. See :func:`attention_scores` for the other arguments.
    """
    if sinks is None and alibi_slopes is None and softcap == 0 and (window == 0 or window >= q.shape[1]):
        if q.is_cuda and q.dtype == torch.float32 and k.shape[2] != q.shape[2]:
            # No float32 kernel on CUDA takes grouped heads; without one all probabilities are made in memory.
            k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) for t in (k, v))
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            scale=scale,
            enable_gqa=True,
        )
        return out.transpose(1, 2).contiguous()
    pos = torch.arange(q.shape[1], device=q.device)
    return _attend(q[0], k[0], v[0], pos, pos, (scale, window, softcap, sinks, alibi_slopes)).unsqueeze(0)


@attention.register_fake
def _(q, k, v, scale, window=0, softcap=0.0, sinks=None, alibi_slopes=None):
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@torch.library.custom_op(f"{NAMESPACE}::paged_attention", mutates_args=("k_cache", "v_cache"))
def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    seq_of_token: Tensor,
    slots: Tensor,
    page_table: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Attention of ragged tokens over a paged key/value cache (PagedAttention, arXiv 2309.06180).

    First appends every token's key and value at its slot, then lets token ``t`` attend to positions
    ``0 .. positions[t]`` of its own sequence.

    Shapes: q, k, v as in :func:`attention`; k_cache ``[pages, kv_heads, page_size, head_dim]`` and v_cache likewise
    (both written in place; see ``cache_rows`` for int8); positions ``[n]`` or ``[1, n]``, seq_of_token, slots ``[n]``,
    integers; page_table ``[sequences, pages_per_seq]`` int32. ``slots[t] = page * page_size + offset``.
    """
    page_size = k_cache.shape[2]
    positions = positions.reshape(-1)
    page, offset = slots.long() // page_size, slots.long() % page_size
    cache_rows.store_rows(k_cache, page, offset, k[0])
    cache_rows.store_rows(v_cache, page, offset, v[0])
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    opts = (scale, window, softcap, sinks, alibi_slopes)
    for seq in seq_of_token.unique().tolist():
        rows = (seq_of_token == seq).nonzero()[:, 0]
        length = int(positions[rows].max()) + 1
        pages = page_table[seq, : (length + page_size - 1) // page_size].long()
        keys, values = (cache_rows.load_rows(cache, pages)[:length] for cache in (k_cache, v_cache))
        where = torch.arange(length, device=q.device)
        out[0, rows] = _attend(q[0, rows], keys, values, positions[rows].long(), where, opts)
    return out


@paged_attention.register_fake
def _(q, k, v, k_cache, v_cache, positions, seq_of_token, slots, page_table, scale, window=0, softcap=0.0,
      sinks=None, alibi_slopes=None):  # fmt: skip
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@torch.library.custom_op(f"{NAMESPACE}::rms_norm", mutates_args=())
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``x * rsqrt(mean(x^2) + eps) * (weight + weight_offset)`` over the last axis, in float32 (arXiv 1910.07467).

    ``x`` and ``weight`` may have different types; the result has ``out_dtype``, by default that of ``x``.
    """
    xf = x.float()
    out = xf * torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        out = out * (weight.float() + weight_offset)
    return out.to(x.dtype if out_dtype is None else out_dtype)


@rms_norm.register_fake
def _(x, weight, eps, weight_offset=0.0, *, out_dtype=None):
    return x.new_empty(x.shape, dtype=out_dtype)


@torch.library.custom_op(f"{NAMESPACE}::layer_norm", mutates_args=())
def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Layer normalization over the last axis, in float32 (arXiv 1607.06450); types as in :func:`rms_norm`."""
    as_float = [None if t is None else t.float() for t in (weight, bias)]
    out = F.layer_norm(x.float(), x.shape[-1:], as_float[0], as_float[1], eps)
    return out.to(x.dtype if out_dtype is None else out_dtype)


@layer_norm.register_fake
def _(x, weight, bias, eps, *, out_dtype=None):
    return x.new_empty(x.shape, dtype=out_dtype)


@torch.library.custom_op(f"{NAMESPACE}::rotary_embedding", mutates_args=())
def rotary_embedding(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) on the first ``cos.shape[-1]`` features of each head.

    Shapes: x ``[1, n, heads, head_dim]``; cos and sin ``[1, n, rotary_dim]``, one value per feature. The partner of
    feature ``i`` is half the rotary width away, or its neighbour when ``interleaved``. The result has ``out_dtype``, by
    default the type of ``x``.
    """
    r = cos.shape[-1]
    c, s = cos.float().unsqueeze(2), sin.float().unsqueeze(2)
    head = x[..., :r].float()
    if interleaved:
        turned = torch.stack([-head[..., 1::2], head[..., 0::2]], dim=-1).flatten(-2)
    else:
        turned = torch.cat([-head[..., r // 2 :], head[..., : r // 2]], dim=-1)
    out = torch.cat([head * c + turned * s, x[..., r:].float()], dim=-1)
    return out.to(x.dtype if out_dtype is None else out_dtype)


@rotary_embedding.register_fake
def _(x, cos, sin, interleaved=False, *, out_dtype=None):
    return x.new_empty(x.shape, dtype=out_dtype)


@torch.library.custom_op(f"{NAMESPACE}::gated_act", mutates_args=())
def gated_act(gate: Tensor, up: Tensor, act: str, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """``act(gate) * up`` with ``act`` one of :data:`ACTIVATIONS` (GLU variants, arXiv 2002.05202).

    The result has ``out_dtype``, by default the type of ``gate``.
    """
    return (ACTIVATIONS[act](gate.float()) * up.float()).to(gate.dtype if out_dtype is None else out_dtype)


@gated_act.register_fake
def _(gate, up, act, *, out_dtype=None):
    return gate.new_empty(gate.shape, dtype=out_dtype)


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, g_idx: Tensor | None, bits: int, group: int
) -> Tensor:
    """Float32 weights ``[N, K]`` of quantization codes ``[N, K]``: ``scale * (code - zero)`` per group of columns."""
    if g_idx is None:
        g_idx = torch.arange(codes.shape[1], device=codes.device) // group
    g_idx = g_idx.long()
    zero = float(2 ** (bits - 1)) if zeros is None else zeros.float()[:, g_idx]
    return (codes.float() - zero) * scales.float()[:, g_idx]


@torch.library.custom_op(f"{NAMESPACE}::quant_linear", mutates_args=())
def quant_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    g_idx: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """``x @ W^T + bias`` with ``W[n, k] = scales[n, g] * (codes[n, k] - zeros[n, g])``, ``g = g_idx[k]``.

    Shapes: x ``[..., K]``; codes uint8 ``[N, K]`` (one code a byte: the form before packing); scales float32
    ``[N, groups]`` holding float16 values; zeros uint8 ``[N, groups]``, or None for the symmetric ``2^(bits-1)``;
    g_idx int32 ``[K]``, or None for ``k // group_size``; bias ``[N]``.
    """
    weight = dequantize(codes, scales, zeros, g_idx, bits, group_size).to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


@quant_linear.register_fake
def _(x, codes, scales, zeros, g_idx, bias, bits, group_size):
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def packed_case(
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    has_zeros: bool,
    has_bias: bool,
    dtype: str,
    rows: int | None = None,
    out_dtype: str | None = None,
) -> Any:
    """The kernel case of a packed linear, which returns the type of its activations unless told otherwise."""
    from gptq_compile.kernels.registry import Case

    return Case.make(
        "quant_linear",
        dtype,
        rows,
        bits=bits,
        group_size=group_size,
        in_features=in_features,
        out_features=out_features,
        has_zeros=has_zeros,
        has_bias=has_bias,
        out_dtype=out_dtype or dtype,
    )


@torch.library.custom_op(f"{NAMESPACE}::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    suffixes: str,
    layout: str,
    bits: int,
    group_size: int,
    out_features: int,
    has_zeros: bool,
) -> Tensor:
    """:func:`quant_linear` on weights in a kernel's packed layout.

    Args:
        x: ``[..., K]``.
        packed: the layout's tensors; ``suffixes`` names them in order, separated by commas.
        bias: ``[N]`` or None.
        layout: a name known to ``kernels.layouts``.
        bits: 2, 3, 4 or 8. ``group_size``: columns that share a scale. ``out_features``: ``N``.
        has_zeros: whether the grid is asymmetric.
    """
    from gptq_compile.kernels import layouts

    case = packed_case(bits, group_size, x.shape[-1], out_features, has_zeros, bias is not None, "float32")
    arrays = {name: t.numpy(force=True) for name, t in zip(suffixes.split(","), packed, strict=True)}
    form = layouts.by_name(layout)
    scales, zeros = form.unpack_grid(case, arrays)
    weight = dequantize(
        torch.from_numpy(form.unpack(case, arrays)),
        torch.from_numpy(scales),
        None if zeros is None else torch.from_numpy(zeros),
        None,
        bits,
        group_size,
    )
    return F.linear(x, weight.to(x.device, x.dtype), None if bias is None else bias.to(x.dtype))


@packed_linear.register_fake
def _(x, packed, bias, suffixes, layout, bits, group_size, out_features, has_zeros):
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.custom_op(f"{NAMESPACE}::expert_linear", mutates_args=())
def expert_linear(
    x: Tensor, weight: Tensor, expert: Tensor, bias: Tensor | None = None, transposed: bool = False
) -> Tensor:
    """``x[i] @ weight[expert[i]]^T + bias[expert[i]]``: a linear layer whose weight is chosen row by row.

    Both layers of a mixture of experts are this op (arXiv 2101.03961 section 2.1).

    Shapes: x ``[..., K]``; weight ``[experts, N, K]``, or ``[experts, K, N]`` if ``transposed``; expert int64
    ``[...]``; bias ``[experts, N]``; result ``[..., N]``.
    """
    rows, ids = x.reshape(-1, x.shape[-1]), expert.reshape(-1)
    out = x.new_empty((rows.shape[0], weight.shape[-1 if transposed else 1]))
    for e in ids.unique().tolist():
        chosen = (ids == e).nonzero()[:, 0]
        w = weight[e].T if transposed else weight[e]
        out[chosen] = F.linear(rows[chosen], w.to(x.dtype), None if bias is None else bias[e].to(x.dtype))
    return out.reshape(*x.shape[:-1], out.shape[-1])


@expert_linear.register_fake
def _(x, weight, expert, bias=None, transposed=False):
    return x.new_empty((*x.shape[:-1], weight.shape[-1 if transposed else 1]))


REFERENCES: dict[Any, Callable[..., Tensor]] = {
    op._opoverload: op._init_fn for op in (attention, rms_norm, layer_norm, rotary_embedding, gated_act, expert_linear)
}
"""Ops of a program in sequence form -> the functions that define them, made of ops that have derivatives."""
