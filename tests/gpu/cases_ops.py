# SPDX-License-Identifier: Apache-2.0
"""Cases of every op but the linear ones, with inputs and float64 references: for the CPU tests and for a GPU machine.

Importing this needs numpy only. An `OpCase` makes the PrimFunc's arguments in order, outputs poisoned, and says what
some of them must hold after the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gptq_compile.kernels import layouts, reference
from gptq_compile.kernels.cache_format import CacheFormat, rounded, row_width
from gptq_compile.kernels.registry import Case
from gptq_compile.kernels.target import Target

Arguments = list[np.ndarray]
PAGE = 16
SIZES = (1, 3, 17, 257)
# Tokens of a static decode batch.
STATIC_SIZES = (1, 3)
_TOLERANCE = {"float32": 2e-5, "float16": 4e-3}


@dataclass(frozen=True)
class OpCase:
    """One case and how to check it.

    Attributes:
        name: unique.
        case: what to compile.
        make_inputs: ``(rng, n) -> arguments`` for n rows, outputs included and poisoned.
        reference: ``arguments before the call -> {argument index: expected}``, float64 or integers.
        sizes: the n to run; the one static number of rows if the case has one.
        tolerance: largest allowed ``|got - expected| / (1 + |expected|)``; for integer outputs the fraction of rows
            that may differ (one row always may when it is not 0).
    """

    name: str
    case: Case
    make_inputs: Callable[[np.random.Generator, int], Arguments]
    reference: Callable[[Arguments], Mapping[int, np.ndarray]]
    sizes: Sequence[int]
    tolerance: float


def mismatch(op_case: OpCase, arguments: Arguments, results: Arguments) -> str | None:
    """Compares the arguments after a call with the reference; returns what is wrong, or None.

    Args:
        op_case: the case that ran.
        arguments: copies of the arguments before the call.
        results: the arguments after it.
    """
    for index, expected in op_case.reference(arguments).items():
        got = results[index]
        if np.issubdtype(expected.dtype, np.integer):
            wrong = int((got != expected).sum())
            allowed = max(1, op_case.tolerance * got.size) if op_case.tolerance else 0
            if wrong > allowed:
                return f"argument {index}: {wrong} of {got.size} values differ"
            continue
        same = np.isnan(got) & np.isnan(expected)
        with np.errstate(invalid="ignore"):
            error = np.where(same, 0.0, np.abs(got.astype(np.float64) - expected) / (1 + np.abs(expected)))
        # A comparison that NaN fails: an element left poisoned is an error.
        if not np.all(error <= op_case.tolerance):
            worst = float(np.nanmax(error)) if not np.isnan(error).all() else float("nan")
            return f"argument {index}: error {worst:.3g} > {op_case.tolerance:.3g}, {int(np.isnan(error).sum())} NaN"
    return None


def _normal(rng: np.random.Generator, shape: Sequence[int], dtype: str, scale: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(shape) * scale).astype(dtype)


def _poison(shape: Sequence[int], dtype: str) -> np.ndarray:
    return np.full(shape, np.nan, dtype) if dtype.startswith("float") else np.full(shape, -77, dtype)


def _norm(
    op: str,
    dtype: str,
    rows: int | None,
    channels: int,
    weight: bool,
    bias: bool,
    offset: float,
    weight_dtype: str | None = None,
    out_dtype: str | None = None,
) -> OpCase:
    weight_dtype, out_dtype = weight_dtype or dtype, out_dtype or dtype
    attrs = {"channels": channels, "eps": 1e-5, "has_weight": weight}
    attrs |= {"weight_offset": offset} if op == "rms_norm" else {"has_bias": bias}
    attrs |= {"weight_dtype": weight_dtype, "out_dtype": out_dtype}

    def make(rng: np.random.Generator, n: int) -> Arguments:
        x = _normal(rng, (n, channels), dtype, 2.0) + np.asarray(0.5, dtype)
        parameters = [_normal(rng, (channels,), weight_dtype) for present in (weight, bias) if present]
        return [x, *parameters, _poison((n, channels), out_dtype)]

    def expect(a: Arguments) -> Mapping[int, np.ndarray]:
        w = a[1] if weight else None
        if op == "rms_norm":
            return {len(a) - 1: reference.rms_norm(a[0], w, 1e-5, offset)}
        return {len(a) - 1: reference.layer_norm(a[0], w, a[-2] if bias else None, 1e-5)}

    mixture = "" if {weight_dtype, out_dtype} == {dtype} else f"-{weight_dtype}-{out_dtype}"
    name = f"{op}-{dtype}{mixture}-{rows}-c{channels}-w{weight:d}b{bias:d}o{offset:g}"
    return _op(name, op, dtype, rows, attrs, make, expect, _TOLERANCE[out_dtype])


def _op(name, op, dtype, rows, attrs, make, expect, tolerance=None) -> OpCase:
    sizes = SIZES if rows is None else (rows,)
    return OpCase(name, Case.make(op, dtype, rows, **attrs), make, expect, sizes, tolerance or _TOLERANCE[dtype])


def _rotary(
    dtype: str,
    rows: int | None,
    heads: int,
    head_dim: int,
    rotary_dim: int,
    interleaved: bool,
    out_dtype: str | None = None,
) -> OpCase:
    attrs = {"heads": heads, "head_dim": head_dim, "rotary_dim": rotary_dim, "interleaved": interleaved}
    out_dtype = out_dtype or dtype
    attrs["out_dtype"] = out_dtype

    def make(rng: np.random.Generator, n: int) -> Arguments:
        angles = rng.uniform(-3, 3, (n, rotary_dim))
        x = _normal(rng, (n, heads, head_dim), dtype)
        return [x, np.cos(angles).astype(dtype), np.sin(angles).astype(dtype), _poison(x.shape, out_dtype)]

    def expect(a: Arguments) -> Mapping[int, np.ndarray]:
        return {3: reference.rotary_embedding(a[0], a[1], a[2], interleaved)}

    name = f"rotary-{dtype}-{out_dtype}-{rows}-h{heads}d{head_dim}r{rotary_dim}i{interleaved:d}"
    return _op(name, "rotary_embedding", dtype, rows, attrs, make, expect, _TOLERANCE[out_dtype])


def _gated(dtype: str, rows: int | None, features: int, act: str, out_dtype: str | None = None) -> OpCase:
    out_dtype = out_dtype or dtype

    def make(rng: np.random.Generator, n: int) -> Arguments:
        return [*(_normal(rng, (n, features), dtype, 3.0) for _ in range(2)), _poison((n, features), out_dtype)]

    def expect(a: Arguments) -> Mapping[int, np.ndarray]:
        return {2: reference.gated_act(a[0], a[1], act)}

    name = f"gated-{dtype}-{out_dtype}-{rows}-f{features}-{act}"
    attrs = {"features": features, "act": act, "out_dtype": out_dtype}
    return _op(name, "gated_act", dtype, rows, attrs, make, expect, _TOLERANCE[out_dtype])


def _experts(
    dtype: str, rows: int | None, experts: int, k: int, n: int, bias: bool = False, transposed: bool = False
) -> OpCase:
    attrs = {"experts": experts, "in_features": k, "out_features": n, "has_bias": bias, "transposed": transposed}

    def make(rng: np.random.Generator, m: int) -> Arguments:
        x = _normal(rng, (m, k), dtype, k**-0.5)
        w = _normal(rng, (experts, k, n) if transposed else (experts, n, k), dtype)
        biases = [_normal(rng, (experts, n), dtype)] if bias else []
        return [x, w, rng.integers(0, experts, m), *biases, _poison((m, n), dtype)]

    def expect(a: Arguments) -> Mapping[int, np.ndarray]:
        return {len(a) - 1: reference.expert_linear(a[0], a[1], a[2], a[3] if bias else None, transposed)}

    name = f"experts-{dtype}-{rows}-e{experts}k{k}n{n}b{bias:d}t{transposed:d}"
    return _op(name, "expert_linear", dtype, rows, attrs, make, expect)


def quant_experts(
    target: str, dtype: str, rows: int | None, bits: int, group: int, experts: int, k: int, n: int, *,
    zeros: bool = True, bias: bool = False,
) -> OpCase:  # fmt: skip
    """Experts whose packed weights are in the layout of ``target`` (``"cpu"`` or ``"cuda"``)."""
    attrs = {"experts": experts, "in_features": k, "out_features": n, "bits": bits, "group_size": group,
             "has_zeros": zeros, "has_bias": bias}  # fmt: skip
    name = f"quant-experts-{target}-{dtype}-{rows}-w{bits}g{group}e{experts}k{k}n{n}z{zeros:d}b{bias:d}"
    case = Case.make("quant_expert_linear", dtype, rows, **attrs)
    slab = layouts.slab_case(case)
    layout = layouts.layout_for(slab, Target.parse(target))
    padded, groups = layouts.padded_rows(case), -(-k // (k if group == -1 else group))

    def make(rng: np.random.Generator, m: int) -> Arguments:
        codes = rng.integers(0, 1 << bits, (experts, padded, k)).astype(np.uint8)
        scales = (rng.uniform(0.5, 1.5, (experts, padded, groups)) / (1 << bits)).astype(np.float16)
        points = rng.integers(0, 1 << bits, (experts, padded, groups)).astype(np.uint8)
        flat = [a.reshape(experts * padded, -1) for a in (codes, scales, points)]
        packed = layout.pack(slab, flat[0], flat[1], flat[2] if zeros else None)
        biases = [_normal(rng, (experts, n), dtype)] if bias else []
        x = _normal(rng, (m, k), dtype, k**-0.5)
        return [x, *packed.values(), rng.integers(0, experts, m), *biases, _poison((m, n), dtype)]

    def expect(a: Arguments) -> Mapping[int, np.ndarray]:
        packed = dict(zip(layout.tensors(slab), a[1:], strict=False))
        scales, points = layout.unpack_grid(slab, packed)
        index = np.arange(k) // (k if group == -1 else group)
        zero = float(1 << (bits - 1)) if points is None else points.astype(np.float64)[:, index]
        weight = (layout.unpack(slab, packed).astype(np.float64) - zero) * scales.astype(np.float64)[:, index]
        weight = weight.reshape(experts, padded, k)[:, :n]
        chosen = a[1 + len(packed)]
        return {len(a) - 1: reference.expert_linear(a[0], weight, chosen, a[-2] if bias else None)}

    return _op(name, "quant_expert_linear", dtype, rows, attrs, make, expect)


def _topk(dtype: str, rows: int | None, width: int, k: int, largest: bool = True) -> OpCase:
    def make(rng: np.random.Generator, m: int) -> Arguments:
        x = np.round(_normal(rng, (m, width), dtype, 4.0))  # with ties
        return [x, _poison((m, k), dtype), _poison((m, k), "int64")]

    def expect(a: Arguments) -> Mapping[int, np.ndarray]:
        values, indices = reference.topk(a[0], k, largest)
        return {1: values.astype(np.float64), 2: indices}

    name = f"topk-{dtype}-{rows}-w{width}k{k}l{largest:d}"
    made = _op(name, "topk", dtype, rows, {"width": width, "k": k, "largest": largest}, make, expect)
    return replace(made, tolerance=0.0)


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
        k, v = (_normal(rng, (n, kv_heads, d), dtype) for d in (head_dim, v_head_dim))
        k[rng.random(n) < 0.05], v[rng.random(n) < 0.05] = 0, np.nan
        widths = (row_width(cache.dtype, d) for d in (head_dim, v_head_dim))
        return [k, v, slots, *(_poison((pages, kv_heads, PAGE, w), cache.dtype) for w in widths)]

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
    return _op(name, "kv_append", dtype, rows, attrs, make, expect)


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
        caches = [_poison((len(order), kv_heads, PAGE, d), rows_dtype) for d in (head_dim, v_dim)]
        taken = 0
        for s, length in enumerate(lengths):
            table[s, : pages[s]] = order[taken : taken + pages[s]]
            taken += int(pages[s])
            j = np.arange(length)
            for cache in caches:
                cache[table[s, j // PAGE], :, j % PAGE] = _normal(rng, (length, kv_heads, cache.shape[-1]), rows_dtype)
        seq, positions = np.zeros(n, np.int32), np.zeros(n, np.int32)
        t = 0
        while t < n:
            s = int(rng.integers(sequences))
            start = int(rng.integers(lengths[s]))
            run = min(int(rng.integers(1, 40)), n - t, int(lengths[s]) - start)
            seq[t : t + run], positions[t : t + run] = s, np.arange(start, start + run)
            t += run
        q = _normal(rng, (n, heads, head_dim), dtype, 2.0)
        extra = [_normal(rng, (heads,), "float32", 2.0)] if sinks else []
        extra += [(2.0 ** -np.arange(1.0, heads + 1)).astype(np.float32)] if alibi else []
        encoded = [form.encode(caches[0], True), form.encode(caches[1], False)]
        return [q, *encoded, positions, seq, table, *extra, _poison((n, heads, v_dim), dtype)]

    def expect(a: Arguments) -> Mapping[int, np.ndarray]:
        extra = dict(zip([k for k, on in (("sinks", sinks), ("alibi_slopes", alibi)) if on], a[6:-1], strict=True))
        decoded = form.decode(a[1], True), form.decode(a[2], False)
        out = reference.paged_attention(a[0], *decoded, *a[3:6], **extra, scale=scale, window=window, softcap=softcap)
        return {len(a) - 1: out}

    flags = "".join(f"-{k}{v:g}" for k, v in (("w", window), ("c", softcap), ("s", sinks), ("a", alibi)) if v)
    of = "" if form.dtype == dtype else f"-{form.dtype}"
    name = f"attention-{dtype}{of}-{rows}-h{heads}k{kv_heads}d{head_dim}v{v_dim}{flags}-{longest}"
    return _op(name, "paged_attention", dtype, rows, attrs, make, expect)


@dataclass(frozen=True)
class Settings:
    """Sampling settings of a row."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


ALL_SETTINGS = (
    Settings(0.0), Settings(1.0), Settings(0.7, 50), Settings(1.3, 0, 0.9), Settings(1.0, 0, 1.0, 0.05),
    Settings(0.8, 40, 0.95, 0.02), Settings(1.0, 1), Settings(1.0, 5000), Settings(2.0, 0, 0.999),
    Settings(1.0, 0, 0.0), Settings(1.0, 3000, 0.5),
)  # fmt: skip


def sampling_arguments(
    rng: np.random.Generator, n: int, vocabulary: int, settings: Sequence[Settings] = ALL_SETTINGS
) -> Arguments:
    """Arguments of `sample`: row i uses settings i modulo their number."""
    rows = [settings[i % len(settings)] for i in range(n)]
    logits = _normal(rng, (n, vocabulary), "float32", 3.0)
    logits[:, rng.permutation(vocabulary)[: vocabulary // 7]] = -np.inf
    return [
        logits,
        np.array([s.temperature for s in rows], np.float32),
        np.array([s.top_k for s in rows], np.int32),
        np.array([s.top_p for s in rows], np.float32),
        np.array([s.min_p for s in rows], np.float32),
        rng.integers(-(2**31), 2**31, n).astype(np.int32),
        rng.integers(0, 1 << 20, n).astype(np.int32),
        _poison((n,), "int32"),
    ]


def _sampling(rows: int | None, vocabulary: int) -> list[OpCase]:
    attrs = {"vocab_size": vocabulary}

    def make(rng: np.random.Generator, n: int) -> Arguments:
        arguments = sampling_arguments(rng, n, vocabulary)
        if n > 10:
            arguments[0][3, vocabulary // 2] = np.nan
            arguments[0][4, :] = -np.inf
            arguments[0][5, 0] = np.inf
            arguments[0][6, 1::2] = arguments[0][6, 0]
        return arguments

    def make_penalty(rng: np.random.Generator, n: int) -> Arguments:
        seen = (rng.random((n, vocabulary)) < 0.3).astype(np.uint8)
        penalty = np.where(np.arange(n) % 3 == 2, 1.0, rng.uniform(0.5, 2.0, n)).astype(np.float32)
        return [_normal(rng, (n, vocabulary), "float32"), seen, penalty]

    def make_seen(rng: np.random.Generator, n: int) -> Arguments:
        tokens = rng.integers(-1, vocabulary, n).astype(np.int32)
        return [(rng.random((n, vocabulary)) < 0.3).astype(np.uint8), tokens]

    name = f"{rows}-v{vocabulary}"
    return [
        _op(f"sample-{name}", "sample", "float32", rows, attrs, make, lambda a: {7: reference.sample(*a[:7])}, 0.01),
        _op(
            f"penalty-{name}", "repetition_penalty", "float32", rows, attrs, make_penalty,
            lambda a: {0: reference.repetition_penalty(*a)},
        ),
        _op(f"seen-{name}", "mark_seen", "float32", rows, attrs, make_seen, lambda a: {0: reference.mark_seen(*a)}),
    ]  # fmt: skip


def _advance(rows: int | None) -> OpCase:
    def make(rng: np.random.Generator, n: int) -> Arguments:
        table = rng.integers(0, 1000, (n, 6)).astype(np.int32)
        positions = rng.integers(0, 6 * PAGE, n).astype(np.int32)
        tokens = rng.integers(-1, 50000, n).astype(np.int32)
        return [tokens, table, _poison((n,), "int32"), positions, _poison((n,), "int32")]

    def expect(a: Arguments) -> Mapping[int, np.ndarray]:
        return dict(zip((2, 3, 4), reference.advance(a[0], a[1], a[3], PAGE), strict=True))

    return _op(f"advance-{rows}", "advance", "float32", rows, {"page_size": PAGE}, make, expect)


def norm_cases(dtype: str) -> list[OpCase]:
    """RMSNorm and LayerNorm: odd widths, with and without parameters, gemma's weight offset."""
    return [
        _norm("rms_norm", dtype, None, 576, True, False, 0.0),
        _norm("rms_norm", dtype, 1, 4096, True, False, 1.0),
        _norm("rms_norm", dtype, None, 33, True, False, 1.0),
        _norm("rms_norm", dtype, 3, 64, False, False, 0.0),
        _norm("layer_norm", dtype, None, 768, True, True, 0.0),
        _norm("layer_norm", dtype, 1, 6000, True, False, 0.0),
        _norm("layer_norm", dtype, None, 50, False, False, 0.0),
        _norm("layer_norm", dtype, 3, 100, True, True, 0.0),
    ]


def mixed_norm_cases() -> list[OpCase]:
    """Norms that end a float32 residual stream in half precision, and those that return to it."""
    full, half = "float32", "float16"
    return [
        _norm("rms_norm", full, None, 576, True, False, 0.0, full, half),
        _norm("rms_norm", full, 1, 4096, True, False, 1.0, half, half),
        _norm("rms_norm", half, 3, 100, True, False, 1.0, full, full),
        _norm("rms_norm", half, None, 64, True, False, 0.0, full, half),
        _norm("rms_norm", full, None, 33, False, False, 0.0, full, half),
        _norm("layer_norm", full, None, 768, True, True, 0.0, full, half),
        _norm("layer_norm", half, 3, 50, True, True, 0.0, full, full),
        _norm("layer_norm", full, 1, 6000, True, False, 0.0, half, half),
    ]


def rotary_cases(dtype: str) -> list[OpCase]:
    """Both pairings, full and partial rotary dimension."""
    other = "float16" if dtype == "float32" else "float32"
    return [
        _rotary(dtype, None, 9, 64, 64, False),
        _rotary(dtype, 3, 3, 80, 32, False, other),
        _rotary(dtype, 1, 3, 128, 128, False),
        _rotary(dtype, None, 4, 80, 32, False),
        _rotary(dtype, None, 5, 64, 64, True),
        _rotary(dtype, 3, 7, 96, 72, True),
        _rotary(dtype, None, 1, 20, 10, False),
    ]


def gated_cases(dtype: str) -> list[OpCase]:
    """Every activation, odd widths."""
    acts = sorted(reference.ACTIVATIONS)
    other = "float16" if dtype == "float32" else "float32"
    same = [_gated(dtype, rows, f, act) for act, (rows, f) in zip(acts, [(None, 1536), (1, 8960), (3, 33)] * 9)]  # noqa: B905
    return [*same, _gated(dtype, None, 1536, acts[0], other), _gated(dtype, 1, 33, acts[1], other)]


def expert_cases(dtype: str) -> list[OpCase]:
    """Both layouts of the weight, widths that no vector divides, and the choice of experts."""
    return [
        _experts(dtype, None, 4, 64, 40),
        _experts(dtype, 3, 5, 33, 7, bias=True),
        _experts(dtype, 1, 2, 100, 130),
        _experts(dtype, None, 4, 30, 37, bias=True, transposed=True),
        _experts(dtype, 3, 3, 64, 160, transposed=True),
        _topk(dtype, None, 8, 2),
        _topk(dtype, 3, 300, 9),
        _topk(dtype, 1, 5, 5, largest=False),
    ]


def quant_expert_cases(target: str, dtype: str) -> list[OpCase]:
    """Every width of codes, groups that no word or vector divides, short last groups, one row and many."""
    return [
        quant_experts(target, dtype, None, 4, 32, 4, 64, 40),
        quant_experts(target, dtype, 3, 3, 32, 5, 96, 7, bias=True),
        quant_experts(target, dtype, 1, 2, 16, 2, 100, 130),
        quant_experts(target, dtype, None, 8, -1, 3, 30, 37, zeros=False, bias=True),
        quant_experts(target, dtype, 3, 3, 20, 3, 50, 33, zeros=False),
        quant_experts(target, dtype, None, 4, 128, 2, 320, 48),
    ]


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


def sampling_cases() -> list[OpCase]:
    """Sampling and the small ops around it; float32 whatever the activations."""
    sized = [case for rows, v in ((None, 50257), (1, 49152), (3, 131)) for case in _sampling(rows, v)]
    return [*sized, _advance(None), _advance(3)]


def op_cases(dtype: str, cache: CacheFormat | None = None) -> list[OpCase]:
    """Every case for one activation type, and a format of the KV cache (by default of that type, and by row)."""
    cases = [*norm_cases(dtype), *rotary_cases(dtype), *gated_cases(dtype), *expert_cases(dtype)]
    cases += attention_cases(dtype, cache)
    return [*cases, *mixed_norm_cases(), *sampling_cases()] if dtype == "float32" else cases
