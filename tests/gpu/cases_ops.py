# SPDX-License-Identifier: Apache-2.0
"""Cases of every op but linears and attention, with float64 references: for the CPU tests and for a GPU machine.

Importing this needs numpy only. An `OpCase` makes the PrimFunc's arguments in order, outputs poisoned, and says what
some of them must hold after the call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gptq_compile.kernels import layouts, reference
from gptq_compile.kernels.cache_format import CacheFormat
from gptq_compile.kernels.registry import Case
from gptq_compile.kernels.target import Target
from tests.gpu.cases_attention import attention_cases
from tests.gpu.op_case import PAGE, TOLERANCE, Arguments, OpCase, normal, op_case, poison


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
        x = normal(rng, (n, channels), dtype, 2.0) + np.asarray(0.5, dtype)
        parameters = [normal(rng, (channels,), weight_dtype) for present in (weight, bias) if present]
        return [x, *parameters, poison((n, channels), out_dtype)]

    def expect(a: Arguments) -> Mapping[int, np.ndarray]:
        w = a[1] if weight else None
        if op == "rms_norm":
            return {len(a) - 1: reference.rms_norm(a[0], w, 1e-5, offset)}
        return {len(a) - 1: reference.layer_norm(a[0], w, a[-2] if bias else None, 1e-5)}

    mixture = "" if {weight_dtype, out_dtype} == {dtype} else f"-{weight_dtype}-{out_dtype}"
    name = f"{op}-{dtype}{mixture}-{rows}-c{channels}-w{weight:d}b{bias:d}o{offset:g}"
    return op_case(name, op, dtype, rows, attrs, make, expect, TOLERANCE[out_dtype])


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
        x = normal(rng, (n, heads, head_dim), dtype)
        return [x, np.cos(angles).astype(dtype), np.sin(angles).astype(dtype), poison(x.shape, out_dtype)]

    def expect(a: Arguments) -> Mapping[int, np.ndarray]:
        return {3: reference.rotary_embedding(a[0], a[1], a[2], interleaved)}

    name = f"rotary-{dtype}-{out_dtype}-{rows}-h{heads}d{head_dim}r{rotary_dim}i{interleaved:d}"
    return op_case(name, "rotary_embedding", dtype, rows, attrs, make, expect, TOLERANCE[out_dtype])


def _gated(dtype: str, rows: int | None, features: int, act: str, out_dtype: str | None = None) -> OpCase:
    out_dtype = out_dtype or dtype

    def make(rng: np.random.Generator, n: int) -> Arguments:
        return [*(normal(rng, (n, features), dtype, 3.0) for _ in range(2)), poison((n, features), out_dtype)]

    def expect(a: Arguments) -> Mapping[int, np.ndarray]:
        return {2: reference.gated_act(a[0], a[1], act)}

    name = f"gated-{dtype}-{out_dtype}-{rows}-f{features}-{act}"
    attrs = {"features": features, "act": act, "out_dtype": out_dtype}
    return op_case(name, "gated_act", dtype, rows, attrs, make, expect, TOLERANCE[out_dtype])


def _experts(
    dtype: str, rows: int | None, experts: int, k: int, n: int, bias: bool = False, transposed: bool = False
) -> OpCase:
    attrs = {"experts": experts, "in_features": k, "out_features": n, "has_bias": bias, "transposed": transposed}

    def make(rng: np.random.Generator, m: int) -> Arguments:
        x = normal(rng, (m, k), dtype, k**-0.5)
        w = normal(rng, (experts, k, n) if transposed else (experts, n, k), dtype)
        biases = [normal(rng, (experts, n), dtype)] if bias else []
        return [x, w, rng.integers(0, experts, m), *biases, poison((m, n), dtype)]

    def expect(a: Arguments) -> Mapping[int, np.ndarray]:
        return {len(a) - 1: reference.expert_linear(a[0], a[1], a[2], a[3] if bias else None, transposed)}

    name = f"experts-{dtype}-{rows}-e{experts}k{k}n{n}b{bias:d}t{transposed:d}"
    return op_case(name, "expert_linear", dtype, rows, attrs, make, expect)


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
        biases = [normal(rng, (experts, n), dtype)] if bias else []
        x = normal(rng, (m, k), dtype, k**-0.5)
        return [x, *packed.values(), rng.integers(0, experts, m), *biases, poison((m, n), dtype)]

    def expect(a: Arguments) -> Mapping[int, np.ndarray]:
        packed = dict(zip(layout.tensors(slab), a[1:], strict=False))
        scales, points = layout.unpack_grid(slab, packed)
        index = np.arange(k) // (k if group == -1 else group)
        zero = float(1 << (bits - 1)) if points is None else points.astype(np.float64)[:, index]
        weight = (layout.unpack(slab, packed).astype(np.float64) - zero) * scales.astype(np.float64)[:, index]
        weight = weight.reshape(experts, padded, k)[:, :n]
        chosen = a[1 + len(packed)]
        return {len(a) - 1: reference.expert_linear(a[0], weight, chosen, a[-2] if bias else None)}

    return op_case(name, "quant_expert_linear", dtype, rows, attrs, make, expect)


def _topk(dtype: str, rows: int | None, width: int, k: int, largest: bool = True) -> OpCase:
    def make(rng: np.random.Generator, m: int) -> Arguments:
        x = np.round(normal(rng, (m, width), dtype, 4.0))  # with ties
        return [x, poison((m, k), dtype), poison((m, k), "int64")]

    def expect(a: Arguments) -> Mapping[int, np.ndarray]:
        values, indices = reference.topk(a[0], k, largest)
        return {1: values.astype(np.float64), 2: indices}

    name = f"topk-{dtype}-{rows}-w{width}k{k}l{largest:d}"
    made = op_case(name, "topk", dtype, rows, {"width": width, "k": k, "largest": largest}, make, expect)
    return replace(made, tolerance=0.0)


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
    logits = normal(rng, (n, vocabulary), "float32", 3.0)
    logits[:, rng.permutation(vocabulary)[: vocabulary // 7]] = -np.inf
    return [
        logits,
        np.array([s.temperature for s in rows], np.float32),
        np.array([s.top_k for s in rows], np.int32),
        np.array([s.top_p for s in rows], np.float32),
        np.array([s.min_p for s in rows], np.float32),
        rng.integers(-(2**31), 2**31, n).astype(np.int32),
        rng.integers(0, 1 << 20, n).astype(np.int32),
        poison((n,), "int32"),
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
        return [normal(rng, (n, vocabulary), "float32"), seen, penalty]

    def make_seen(rng: np.random.Generator, n: int) -> Arguments:
        tokens = rng.integers(-1, vocabulary, n).astype(np.int32)
        return [(rng.random((n, vocabulary)) < 0.3).astype(np.uint8), tokens]

    name = f"{rows}-v{vocabulary}"
    return [
        op_case(
            f"sample-{name}", "sample", "float32", rows, attrs, make, lambda a: {7: reference.sample(*a[:7])}, 0.01
        ),
        op_case(
            f"penalty-{name}", "repetition_penalty", "float32", rows, attrs, make_penalty,
            lambda a: {0: reference.repetition_penalty(*a)},
        ),
        op_case(f"seen-{name}", "mark_seen", "float32", rows, attrs, make_seen, lambda a: {0: reference.mark_seen(*a)}),
    ]  # fmt: skip


def _advance(rows: int | None) -> OpCase:
    def make(rng: np.random.Generator, n: int) -> Arguments:
        table = rng.integers(0, 1000, (n, 6)).astype(np.int32)
        positions = rng.integers(0, 6 * PAGE, n).astype(np.int32)
        tokens = rng.integers(-1, 50000, n).astype(np.int32)
        return [tokens, table, poison((n,), "int32"), positions, poison((n,), "int32")]

    def expect(a: Arguments) -> Mapping[int, np.ndarray]:
        return dict(zip((2, 3, 4), reference.advance(a[0], a[1], a[3], PAGE), strict=True))

    return op_case(f"advance-{rows}", "advance", "float32", rows, {"page_size": PAGE}, make, expect)


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


def sampling_cases() -> list[OpCase]:
    """Sampling and the small ops around it; float32 whatever the activations."""
    sized = [case for rows, v in ((None, 50257), (1, 49152), (3, 131)) for case in _sampling(rows, v)]
    return [*sized, _advance(None), _advance(3)]


def op_cases(dtype: str, cache: CacheFormat | None = None) -> list[OpCase]:
    """Every case for one activation type, and a format of the KV cache (by default of that type, and by row)."""
    cases = [*norm_cases(dtype), *rotary_cases(dtype), *gated_cases(dtype), *expert_cases(dtype)]
    cases += attention_cases(dtype, cache)
    return [*cases, *mixed_norm_cases(), *sampling_cases()] if dtype == "float32" else cases
