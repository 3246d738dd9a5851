# SPDX-License-Identifier: Apache-2.0
"""Cases of attention over the paged cache, and of appending to it, with float64 references. Needs numpy only."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gptq_compile.kernels import reference
from gptq_compile.kernels.cache_format import CacheFormat, rounded, row_width
from tests.gpu.op_case import PAGE, Arguments, OpCase, normal, op_case, poison


def _append(
    dtype: str, rows: int | None, kv_heads: int, head_dim: int, v_head_dim: int, cache: CacheFormat | None = None
) -> OpCase:
    cache = cache or CacheFormat(dtype)
    attrs = {"kv_heads": kv_heads, "head_dim": head_dim, "v_head_dim": v_head_dim, "page_size": PAGE}
    attrs |= {"cache_dtype": cache.dtype} if cache.dtype != dtype else {}

    def make(rng: np.random.Generator, n: int) -> Arguments:
        pages = n // PAGE + 3
        slots = rng.permutation(pages * PAGE)[:n].astype(np.int32)
        slots[rng.random(n) < 0.1] = -1
        k, v = (normal(rng, (n, kv_heads, d), dtype) for d in (head_dim, v_head_dim))
        k[rng.random(n) < 0.05], v[rng.random(n) < 0.05] = 0, np.nan
        widths = (row_width(cache.dtype, d) for d in (head_dim, v_head_dim))
        return [k, v, slots, *(poison((pages, kv_heads, PAGE, w), cache.dtype) for w in widths)]

    def expect(a: Arguments) -> Mapping[int, np.ndarray]:
        caches = [cache.split(a[3], True), cache.split(a[4], False)]
        if cache.dtype == "int8":
            (k, k_scales), (v, v_scales) = rounded(a[0]), rounded(a[1])
            scales = reference.kv_append(
                k_scales[..., None], v_scales[..., None], a[2], *(c[1][..., None] for c in caches)
            )
            k_cache, v_cache = reference.kv_append(k, v, a[2], caches[0][0], caches[1][0])
            return {3: cache.join(k_cache, scales[0][..., 0], True), 4: cache.join(v_cache, scales[1][..., 0], False)}
        k_cache, v_cache = reference.kv_append(*a[:3], caches[0][0], caches[1][0])
        after = cache.join(k_cache, None, True), cache.join(v_cache, None, False)
        return {3: after[0].astype(np.float64), 4: after[1].astype(np.float64)}

    name = f"append-{dtype}-{cache.dtype}-{rows}-h{kv_heads}d{head_dim}v{v_head_dim}"
    return op_case(name, "kv_append", dtype, rows, attrs, make, expect)


def attention(
    dtype: str,
    rows: int | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
    v_head_dim: int | None = None,
    *,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: bool = False,
    alibi: bool = False,
    longest: int = 300,
    cache: CacheFormat | None = None,
) -> OpCase:
    """Ragged attention: runs of tokens of up to five sequences, shuffled pages, all that must not be read is NaN."""
    form = cache or CacheFormat(dtype)
    rows_dtype = "float32" if form.dtype == "int8" else form.dtype
    v_dim = v_head_dim or head_dim
    scale = scale or head_dim**-0.5
    attrs = {
        "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "v_head_dim": v_dim, "page_size": PAGE,
        "scale": scale, "window": window, "softcap": softcap, "has_sinks": sinks, "has_alibi": alibi,
    }  # fmt: skip
    attrs |= {"cache_dtype": form.dtype} if form.dtype != dtype else {}

    def make(rng: np.random.Generator, n: int) -> Arguments:
        sequences = min(n, 5)
        lengths = rng.integers(1, longest + 1, sequences)
        lengths[-1] = longest
        pages = -(-lengths // PAGE)
        order = rng.permutation(int(pages.sum()) + 2)
        # Entries beyond a sequence's pages must not be followed.
        table = np.full((sequences, int(pages.max()) + 1), -(1 << 20), np.int32)
        caches = [poison((len(order), kv_heads, PAGE, d), rows_dtype) for d in (head_dim, v_dim)]
        taken = 0
        for s, length in enumerate(lengths):
            table[s, : pages[s]] = order[taken : taken + pages[s]]
            taken += int(pages[s])
            j = np.arange(length)
            for cache in caches:
                cache[table[s, j // PAGE], :, j % PAGE] = normal(rng, (length, kv_heads, cache.shape[-1]), rows_dtype)
        seq, positions = np.zeros(n, np.int32), np.zeros(n, np.int32)
        t = 0
        while t < n:
            s = int(rng.integers(sequences))
            start = int(rng.integers(lengths[s]))
            run = min(int(rng.integers(1, 40)), n - t, int(lengths[s]) - start)
            seq[t : t + run], positions[t : t + run] = s, np.arange(start, start + run)
            t += run
        q = normal(rng, (n, heads, head_dim), dtype, 2.0)
        extra = [normal(rng, (heads,), "float32", 2.0)] if sinks else []
        extra += [(2.0 ** -np.arange(1.0, heads + 1)).astype(np.float32)] if alibi else []
        encoded = [form.encode(caches[0], True), form.encode(caches[1], False)]
        return [q, *encoded, positions, seq, table, *extra, poison((n, heads, v_dim), dtype)]

    def expect(a: Arguments) -> Mapping[int, np.ndarray]:
        extra = dict(zip([k for k, on in (("sinks", sinks), ("alibi_slopes", alibi)) if on], a[6:-1], strict=True))
        decoded = form.decode(a[1], True), form.decode(a[2], False)
        out = reference.paged_attention(a[0], *decoded, *a[3:6], **extra, scale=scale, window=window, softcap=softcap)
        return {len(a) - 1: out}

    flags = "".join(f"-{k}{v:g}" for k, v in (("w", window), ("c", softcap), ("s", sinks), ("a", alibi)) if v)
    of = "" if form.dtype == dtype else f"-{form.dtype}"
    name = f"attention-{dtype}{of}-{rows}-h{heads}k{kv_heads}d{head_dim}v{v_dim}{flags}-{longest}"
    return op_case(name, "paged_attention", dtype, rows, attrs, make, expect)


def attention_cases(dtype: str, cache: CacheFormat | None = None) -> list[OpCase]:
    """Grouped, multi-query and full attention, head dimensions 16 to 256, and every option by itself and together."""
    return [
        _append(dtype, None, 3, 64, 64, cache=cache),
        _append(dtype, 1, 1, 80, 48, cache=cache),
        attention(dtype, None, 9, 3, 64, cache=cache),
        attention(dtype, 1, 9, 3, 64, longest=1100, cache=cache),
        attention(dtype, 3, 32, 8, 128, cache=cache),
        attention(dtype, None, 8, 1, 128, longest=90, cache=cache),
        attention(dtype, 3, 7, 1, 64, cache=cache),
        attention(dtype, None, 4, 4, 80, cache=cache),
        attention(dtype, 3, 4, 2, 80, cache=cache),
        attention(dtype, None, 4, 2, 96, window=20, cache=cache),
        attention(dtype, 3, 4, 2, 96, window=20, cache=cache),
        attention(dtype, None, 4, 2, 256, softcap=5.0, cache=cache),
        attention(dtype, 1, 4, 2, 256, softcap=5.0, cache=cache),
        attention(dtype, None, 16, 2, 16, sinks=True, cache=cache),
        attention(dtype, 3, 16, 2, 16, sinks=True, cache=cache),
        attention(dtype, None, 6, 6, 64, alibi=True, cache=cache),
        attention(dtype, 1, 6, 6, 64, alibi=True, cache=cache),
        attention(dtype, None, 4, 2, 48, 32, window=33, softcap=20.0, sinks=True, alibi=True, cache=cache),
        attention(dtype, 3, 4, 2, 48, 32, window=33, softcap=20.0, sinks=True, alibi=True, cache=cache),
        attention(dtype, None, 2, 1, 24, 72, scale=0.3, cache=cache),
        attention(dtype, 1, 2, 1, 12, 20, window=1, cache=cache),
    ]
