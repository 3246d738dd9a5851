# SPDX-License-Identifier: Apache-2.0
"""What every op computes, in numpy float64: the documentation of the ops, and what the tests compare against.

Shapes and argument order are those of the PrimFuncs (inputs first); results are returned instead of written. Nothing
here is used at run time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

Array = np.ndarray

_erf = np.vectorize(math.erf, otypes=[np.float64])
ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_quick": lambda x: x / (1 + np.exp(-1.702 * x)),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "identity": lambda x: x,
}


def quant_linear(weight: Array, x: Array, bias: Array | None = None) -> Array:
    """Returns x[m, K] @ weight[N, K].T + bias[N] for the dequantized weight."""
    out = x.astype(np.float64) @ weight.astype(np.float64).T
    return out if bias is None else out + bias.astype(np.float64)


def rms_norm(x: Array, weight: Array | None, eps: float, weight_offset: float = 0.0) -> Array:
    """Returns x * rsqrt(mean(x^2) + eps) * (weight + weight_offset) for x[m, C]."""
    x = x.astype(np.float64)
    out = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    return out if weight is None else out * (weight.astype(np.float64) + weight_offset)


def layer_norm(x: Array, weight: Array | None, bias: Array | None, eps: float) -> Array:
    """Returns (x - mean) / sqrt(var + eps) * weight + bias for x[m, C], with the biased variance."""
    x = x.astype(np.float64)
    out = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    out = out if weight is None else out * weight.astype(np.float64)
    return out if bias is None else out + bias.astype(np.float64)


def rotary_embedding(x: Array, cos: Array, sin: Array, interleaved: bool = False) -> Array:
    """Rotates the first R = cos.shape[1] elements of every head of x[n, H, D]; the others are copied."""
    out = x.astype(np.float64)
    c, s = cos.astype(np.float64)[:, None], sin.astype(np.float64)[:, None]
    part = out[..., : cos.shape[1]].copy()
    turned = np.empty_like(part)
    if interleaved:
        turned[..., 0::2], turned[..., 1::2] = -part[..., 1::2], part[..., 0::2]
    else:
        half = part.shape[-1] // 2
        turned[..., :half], turned[..., half:] = -part[..., half:], part[..., :half]
    out[..., : cos.shape[1]] = part * c + turned * s
    return out


def gated_act(gate: Array, up: Array, act: str) -> Array:
    """Returns act(gate) * up."""
    return ACTIVATIONS[act](gate.astype(np.float64)) * up.astype(np.float64)


def expert_linear(x: Array, weight: Array, expert: Array, bias: Array | None = None, transposed: bool = False) -> Array:
    """Returns x[i] @ weight[expert[i]].T + bias[expert[i]] for x[m, K], weight[E, N, K] ([E, K, N] if transposed)."""
    w = weight.astype(np.float64) if transposed else weight.astype(np.float64).swapaxes(1, 2)
    out = np.stack([row @ w[e] for row, e in zip(x.astype(np.float64), expert, strict=True)])
    return out if bias is None else out + bias.astype(np.float64)[expert]


def topk(x: Array, k: int, largest: bool = True) -> tuple[Array, Array]:
    """Returns (values, indices)[m, k], best first; of equal elements the lower index is first."""
    order = np.argsort(-x.astype(np.float64) if largest else x.astype(np.float64), axis=-1, kind="stable")[:, :k]
    return np.take_along_axis(x, order, -1), order


def kv_append(k: Array, v: Array, slots: Array, k_cache: Array, v_cache: Array) -> tuple[Array, Array]:
    """Returns copies of the caches [pages, kv_heads, page_size, D] with token t's k, v at slots[t]; -1 is skipped."""
    k_cache, v_cache = k_cache.copy(), v_cache.copy()
    page_size = k_cache.shape[2]
    for t, slot in enumerate(slots):
        if slot >= 0:
            k_cache[slot // page_size, :, slot % page_size] = k[t]
            v_cache[slot // page_size, :, slot % page_size] = v[t]
    return k_cache, v_cache


def paged_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    positions: Array,
    seq_of_token: Array,
    page_table: Array,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Array:
    """Returns softmax(softcap(scale * q.k) + slope * (j - position)) . v, [n, H, Dv], over the visible positions j."""
    n, heads, _ = q.shape
    kv_heads, page_size = k_cache.shape[1:3]
    out = np.zeros((n, heads, v_cache.shape[-1]))
    for t in range(n):
        position = int(positions[t])
        j = np.arange(max(0, position - window + 1) if window else 0, position + 1)
        pages = page_table[seq_of_token[t]][j // page_size]
        for h in range(heads):
            kv = h // (heads // kv_heads)
            scores = k_cache[pages, kv, j % page_size].astype(np.float64) @ q[t, h].astype(np.float64) * scale
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            if alibi_slopes is not None:
                scores = scores + float(alibi_slopes[h]) * (j - position)
            extra = [] if sinks is None else [float(sinks[h])]
            top = max([scores.max(), *extra])
            weights = np.exp(scores - top)
            total = weights.sum() + sum(math.exp(sink - top) for sink in extra)
            out[t, h] = weights @ v_cache[pages, kv, j % page_size].astype(np.float64) / total
    return out


def uniform(seed: int, position: int) -> float:
    """Returns the uniform in [0, 1) of a token: 24 bits of a hash of (seed, position), both taken modulo 2^32.

    The mixer is lowbias32 of C. Wellons, "Prospecting for hash functions" (2018), applied to the seed, then to the
    result plus the position, then once more.
    """
    mask = 0xFFFFFFFF

    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
        x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
        return x ^ (x >> 16)

    first = mix(((seed & mask) + 0x9E3779B9) & mask)
    return (mix(mix((first + (position & mask)) & mask)) >> 8) / (1 << 24)


def sampling_keep(logits: Array, temperature: float, top_k: int, top_p: float, min_p: float) -> Array:
    """Returns the mask bool[V] of tokens that may be drawn, for temperature > 0.

    As Hugging Face's warpers in the order temperature, top_k, top_p, min_p, except that top_p keeps all tokens equal
    to the last one kept (theirs breaks such ties by the order of a sort).
    """
    scaled = logits.astype(np.float64) / temperature
    keep = np.ones(len(scaled), bool)
    if 0 < top_k < len(scaled):
        keep &= scaled >= np.sort(scaled)[-top_k]
    weights = np.where(keep, np.exp(scaled - scaled.max()), 0.0)
    if top_p < 1:
        order = np.argsort(-scaled, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        kept = order[before < top_p * weights.sum()]
        keep &= scaled >= (scaled[kept].min() if len(kept) else scaled.max())
    if min_p > 0:
        keep &= weights >= min_p
    return keep


def sample(
    logits: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array, seeds: Array, positions: Array
) -> Array:
    """Returns the drawn token of each row of logits[b, V], i32[b]; -1 for a row without a distribution.

    Temperature 0 takes the largest logit, the lowest index winning. Otherwise the token is the first whose cumulative
    probability, in index order over the kept tokens, exceeds `uniform(seed, position)`. A row with a NaN, with
    +infinity or without a finite logit has no distribution.
    """
    out = np.full(len(logits), -1, np.int32)
    for i, row in enumerate(logits):
        if np.isnan(row).any() or not np.isfinite(row.max()):
            continue
        if temperature[i] <= 0:
            out[i] = int(np.argmax(row))
            continue
        keep = sampling_keep(row, float(temperature[i]), int(top_k[i]), float(top_p[i]), float(min_p[i]))
        weights = np.where(keep, np.exp((row.astype(np.float64) - float(row.max())) / float(temperature[i])), 0.0)
        cumulative = np.cumsum(weights)
        target = uniform(int(seeds[i]), int(positions[i])) * cumulative[-1]
        out[i] = int(np.searchsorted(cumulative, target, side="right"))
    return out


def repetition_penalty(logits: Array, seen: Array, penalty: Array) -> Array:
    """Divides positive, multiplies negative logits of seen tokens by the penalty (Keskar et al. 2019, sec. 4.1)."""
    p = penalty[:, None].astype(np.float64)
    return np.where(seen != 0, np.where(logits > 0, logits / p, logits * p), logits)


def mark_seen(seen: Array, tokens: Array) -> Array:
    """Returns seen[b, V] with a 1 at each row's token; tokens outside the vocabulary are skipped."""
    seen = seen.copy()
    for row, token in enumerate(tokens):
        if 0 <= token < seen.shape[1]:
            seen[row, token] = 1
    return seen


def advance(tokens: Array, page_table: Array, positions: Array, page_size: int) -> tuple[Array, Array, Array]:
    """Returns (input_ids, positions, slots) of the next decode step: sequence i is row i.

    A negative token (a row that could not be sampled) becomes input id 0; a position beyond the page table gets
    slot -1, which kv_append skips.
    """
    following = positions + 1
    page = following // page_size
    inside = page < page_table.shape[1]
    rows = np.arange(len(tokens))
    slots = page_table[rows, np.minimum(page, page_table.shape[1] - 1)] * page_size + following % page_size
    return np.maximum(tokens, 0), following, np.where(inside, slots, -1)
