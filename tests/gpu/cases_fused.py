# SPDX-License-Identifier: Apache-2.0
"""Cases of quantized linears that make their activations and add a residual, with float64 references.

Importing this needs numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from cases import Arguments, BuiltFor, KernelCase, mean_error, poisoned

from gptq_compile.kernels.layouts import layout_for, reads_natural
from gptq_compile.kernels.registry import Case
from gptq_compile.kernels.words import Grouping

_ERF = np.vectorize(math.erf)
_ACTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda v: v / (1 + np.exp(-v)),
    "gelu": lambda v: 0.5 * v * (1 + _ERF(v / math.sqrt(2))),
    "gelu_tanh": lambda v: 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "relu": lambda v: np.maximum(v, 0),
    "relu2": lambda v: np.maximum(v, 0) ** 2,
}


def cases() -> list[KernelCase]:
    """All of them."""
    return made_inputs() + gated_results() + several_rows(reads_natural(BuiltFor.target))


def made_inputs() -> list[KernelCase]:
    """Every kind of input, with 2 to 8 bits, one and several rows, short last groups and odd sizes."""
    found = []
    shapes = [
        # bits, group, K, N, rows
        (4, 128, 576, 40, 1), (4, 128, 264, 37, 3), (3, 64, 200, 33, 1), (2, 32, 96, 21, 3), (8, -1, 136, 19, 1),
        (4, 128, 4096, 6145, 1), (4, 128, 1536, 577, 1), (3, 128, 4096, 1024, 4), (4, 128, 14336, 4096, 1),
    ]  # fmt: skip
    inputs = {
        "rms": {"input": "rms_norm", "input_dtype": "float32", "eps": 1e-5, "has_norm_weight": True},
        "rms_offset": {
            "input": "rms_norm",
            "input_dtype": "float16",
            "eps": 1e-5,
            "has_norm_weight": True,
            "weight_offset": 1.0,
        },
        "layer": {
            "input": "layer_norm",
            "input_dtype": "float32",
            "eps": 1e-5,
            "has_norm_weight": True,
            "has_norm_bias": True,
        },
        "silu": {"input": "gated", "act": "silu"},
        "gelu_tanh": {"input": "gated", "act": "gelu_tanh", "input_dtype": "float32"},
        "gelu": {"input": "activated", "act": "gelu"},
        "relu": {"input": "activated", "act": "relu"},
        "plain": {},
    }
    for i, (bits, group, k, n, rows) in enumerate(shapes):
        for j, (label, attrs) in enumerate(inputs.items()):
            small = k * n * rows < 60000
            if not small and (attrs.get("input") in ("rms_norm", "layer_norm")) != (k <= 4096 and n != 577):
                continue
            if rows > 1 and not small and label != "rms":
                continue
            found.append(_case(label, bits, group, k, n, rows, attrs, has_zeros=(i + j) % 2 == 0, residual=j % 3 != 1))
    return found


def gated_results() -> list[KernelCase]:
    """Gates and their factors multiplied side by side, of a tensor and of norms of one: 1 to 4 rows."""
    found = []
    shapes = [
        # bits, group, K, N, rows
        (4, 128, 576, 96, 1), (4, 128, 264, 64, 3), (3, 64, 120, 32, 1), (2, 32, 416, 96, 2), (8, -1, 384, 64, 4),
        (4, 128, 4096, 28672, 1), (4, 128, 4096, 28672, 3), (3, 128, 4096, 28672, 1), (2, 128, 4096, 28672, 4),
        (8, 128, 4096, 28672, 1), (4, 64, 8192, 5632, 2),
    ]  # fmt: skip
    norm = {"input": "rms_norm", "input_dtype": "float32", "eps": 1e-5, "has_norm_weight": True}
    for i, (bits, group, k, n, rows) in enumerate(shapes):
        for label, attrs in (("gates", {}), ("rms_gates", norm)):
            zeros = (i + bool(attrs)) % 2 == 0
            act = "silu" if zeros else "gelu_tanh"
            found.append(_case(label, bits, group, k, n, rows, {**attrs, "out_act": act}, zeros, residual=False))
    return found


def several_rows(natural: bool) -> list[KernelCase]:
    """Results that are added to a stream or gated: 4 to 16 rows, with weights in natural order any number of them."""
    found = []
    shapes = [
        # bits, group, K, N, rows
        (4, 128, 576, 72, 8), (4, 128, 264, 80, 13), (3, 64, 200, 48, 5), (2, 32, 416, 96, 11), (8, -1, 384, 64, 16),
        (4, 128, 4096, 6144, 16), (4, 128, 4096, 28672, 8), (4, 128, 14336, 4096, 4), (4, 128, 14336, 4096, 8),
        (4, 128, 14336, 4096, 16), (3, 128, 14336, 1056, 8), (4, 64, 9224, 1042, 16), (2, 32, 11008, 608, 9),
        (8, -1, 8200, 333, 5), (4, 128, 256, 320, 17), (4, 64, 576, 416, 70),
        (3, 128, 4096, 6144, 257),
    ]  # fmt: skip
    for i, (bits, group, k, n, rows) in enumerate(shapes):
        for label, attrs in (("added", {}), ("gates", {"out_act": "silu"})):
            if (attrs and n % 32) or (rows > 16 and not natural):
                continue
            zeros = (i + bool(attrs)) % 2 == 0
            found.append(_case(label, bits, group, k, n, rows, attrs, zeros, residual=not attrs, symbolic=rows > 16))
    return found


def _case(label, bits, group, k, n, rows, attrs, has_zeros, residual, symbolic=False) -> KernelCase:
    attrs = dict(attrs)
    gated = attrs.get("input") == "gated"
    if gated:
        attrs |= {"width": 2 * k + 16, "at": 8, "up_width": 2 * k + 16, "up_at": k + 16}
    case = Case.make(
        "fused_linear", "float16", None if symbolic else rows,
        in_features=k, out_features=n, bits=bits, group_size=group,
        has_zeros=has_zeros, has_bias=k % 3 == 0, has_residual=residual,
        out_dtype="float32" if residual else "float16", **attrs,
    )  # fmt: skip
    name = f"fused_{label}_b{bits}_g{group}_k{k}_n{n}_m{rows}"
    grouping = Grouping.of(bits, k, group)
    dtype = attrs.get("input_dtype", "float16")

    def make(rng: np.random.Generator) -> Arguments:
        width = 2 * k + 16 if gated else k
        x = (rng.normal(size=(rows, width)) * 2 + (0.5 if label == "layer" else 0)).astype(dtype)
        found = [x, x.copy()] if gated else [x]
        for flag in ("has_norm_weight", "has_norm_bias"):
            if attrs.get(flag):
                found.append(rng.normal(size=k).astype(np.float32))
        codes = rng.integers(0, 1 << bits, (n, k), dtype=np.uint8)
        # The product of two results of 8 bits would be more than a half holds.
        unit = 1600 if bits == 8 else 100
        scales = (rng.uniform(0.5, 2.0, (n, grouping.groups)) / unit).astype(np.float16).astype(np.float32)
        zeros = rng.integers(0, 1 << bits, scales.shape, dtype=np.uint8) if has_zeros else None
        found += layout_for(case, BuiltFor.target).pack(case, codes, scales, zeros).values()
        if case["has_bias"]:
            found.append(rng.normal(size=n).astype(np.float16))
        if residual:
            found.append(rng.normal(size=(rows, n)).astype(np.float32))
        return [*found, poisoned((rows, n // 2 if "out_act" in attrs else n), case["out_dtype"])]

    def check(before: Arguments, after: Arguments) -> tuple[bool, str]:
        return mean_error(after[-1], _expected(case, grouping, before))

    return KernelCase(name, case, make, check)


def _expected(case: Case, grouping: Grouping, arguments: Arguments) -> np.ndarray:
    left = list(arguments)
    kind, k = case.get("input", "plain"), case["in_features"]
    x = left.pop(0).astype(np.float64)
    if kind == "gated":
        up = left.pop(0).astype(np.float64)[:, case["up_at"] : case["up_at"] + k]
        x = _ACTS[case["act"]](x[:, case["at"] : case["at"] + k]) * up
    elif kind == "activated":
        x = _ACTS[case["act"]](x)
    elif kind != "plain":
        if kind == "layer_norm":
            x = x - x.mean(1, keepdims=True)
        x = x / np.sqrt((x**2).mean(1, keepdims=True) + case["eps"])
        if case.get("has_norm_weight"):
            x = x * (left.pop(0).astype(np.float64) + case.get("weight_offset", 0.0))
        if case.get("has_norm_bias"):
            x = x + left.pop(0).astype(np.float64)
    x = x.astype(np.float16).astype(np.float64)
    names = list(layout_for(case, BuiltFor.target).tensors(case))
    packed = {name: left.pop(0) for name in names}
    layout = layout_for(case, BuiltFor.target)
    codes, (scales, zeros) = layout.unpack(case, packed), layout.unpack_grid(case, packed)
    group = np.arange(k) // grouping.group_size
    zero = np.full(scales.shape, 1 << (grouping.bits - 1), np.float64) if zeros is None else zeros.astype(np.float64)
    out = x @ (scales.astype(np.float64)[:, group] * (codes - zero[:, group])).T
    if case["has_bias"]:
        out = out + left.pop(0).astype(np.float64)
    if case.get("out_act"):
        half = case["out_features"] // 2
        out = _ACTS[case["out_act"]](out[:, :half]) * out[:, half:]
    if case.get("has_residual"):
        out = out + left.pop(0).astype(np.float64)
    return out
