# SPDX-License-Identifier: Apache-2.0
"""Checks of quant_linear and linear: all bits, odd groups, odd N and K, M from 1 to 520, biases, zero points."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
from cases import BuiltFor, KernelCase, mean_error, poisoned

from gptq_compile.kernels.layouts import layout_for
from gptq_compile.kernels.registry import Case
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.words import Grouping


def quant_inputs(
    case: Case, rows: int, target: Target | None = None
) -> Callable[[np.random.Generator], list[np.ndarray]]:
    """Returns the maker of (x, packed..., [bias], out) for a quant_linear case, by default as `BuiltFor` says."""

    def make(rng: np.random.Generator) -> list[np.ndarray]:
        n, k, bits = case["out_features"], case["in_features"], case["bits"]
        grid = (n, Grouping.of(bits, k, case["group_size"]).groups)
        codes = rng.integers(0, 1 << bits, (n, k), dtype=np.uint8)
        scales = (rng.uniform(0.5, 2.0, grid) / 100).astype(np.float16).astype(np.float32)
        zeros = rng.integers(0, 1 << bits, grid, dtype=np.uint8) if case["has_zeros"] else None
        packed = layout_for(case, target or BuiltFor.target).pack(case, codes, scales, zeros)
        bias = [rng.normal(size=n).astype(case.dtype)] if case["has_bias"] else []
        x = rng.normal(size=(rows, k)).astype(case.dtype)
        return [x, *packed.values(), *bias, poisoned((rows, n), case.get("out_dtype", case.dtype))]

    return make


def quant_reference(case: Case, target: Target | None = None) -> Callable[[list[np.ndarray]], np.ndarray]:
    """Returns the float64 reference: unpack, dequantize, multiply."""

    def reference(arguments: list[np.ndarray]) -> np.ndarray:
        layout = layout_for(case, target or BuiltFor.target)
        names = list(layout.tensors(case))
        packed = dict(zip(names, arguments[1 : 1 + len(names)], strict=True))
        codes = layout.unpack(case, packed).astype(np.float64)
        scales, zeros = layout.unpack_grid(case, packed)
        zero = np.full(scales.shape, 1 << (case["bits"] - 1)) if zeros is None else zeros
        group = (
            np.arange(case["in_features"])
            // Grouping.of(case["bits"], case["in_features"], case["group_size"]).group_size
        )
        weight = scales.astype(np.float64)[:, group] * (codes - zero.astype(np.float64)[:, group])
        result = arguments[0].astype(np.float64) @ weight.T
        if case["has_bias"]:
            result = result + arguments[1 + len(names)].astype(np.float64)
        return result

    return reference


def linear_inputs(case: Case, rows: int) -> Callable[[np.random.Generator], list[np.ndarray]]:
    """Returns the maker of (x, w, [bias], out) for a linear case."""

    def make(rng: np.random.Generator) -> list[np.ndarray]:
        n, k = case["out_features"], case["in_features"]
        x = rng.normal(size=(rows, k)).astype(case.dtype)
        w = (rng.normal(size=(n, k)) / np.sqrt(k)).astype(case.get("weight_dtype", case.dtype))
        bias = [rng.normal(size=n).astype(case.dtype)] if case["has_bias"] else []
        return [x, w, *bias, poisoned((rows, n), case.get("out_dtype", case.dtype))]

    return make


def linear_reference(case: Case) -> Callable[[list[np.ndarray]], np.ndarray]:
    """Returns the float64 reference of a linear case."""

    def reference(arguments: list[np.ndarray]) -> np.ndarray:
        result = arguments[0].astype(np.float64) @ arguments[1].astype(np.float64).T
        if case["has_bias"]:
            result = result + arguments[2].astype(np.float64)
        return result

    return reference


def _checked(
    reference: Callable[[list[np.ndarray]], np.ndarray],
) -> Callable[[list[np.ndarray], list[np.ndarray]], tuple[bool, str]]:
    """Returns the check of the last argument, the output."""
    return lambda before, after: mean_error(after[-1], reference(before))


def _quant(bits: int, group: int, k: int, n: int, rows: int, static: bool, dtype: str = "float16") -> KernelCase:
    # Zero points, biases and wide results alternate by a hash, so that every bit width meets all combinations.
    name = f"quant_b{bits}_g{group}_k{k}_n{n}_{dtype}"
    mix = zlib.crc32(name.encode())
    case = Case.make(
        "quant_linear", dtype, rows if static else None, in_features=k, out_features=n, bits=bits,
        group_size=group, has_zeros=bool(mix & 1), has_bias=bool(mix & 2),
        out_dtype="float32" if mix & 4 else dtype,
    )  # fmt: skip
    full = f"{name}_m{rows}{'_static' if static else ''}"
    return KernelCase(full, case, quant_inputs(case, rows), _checked(quant_reference(case)))


def _linear(k: int, n: int, rows: int, static: bool, has_bias: bool, **dtypes: str) -> KernelCase:
    dtype = dtypes.pop("dtype", "float16")
    case = Case.make(
        "linear", dtype, rows if static else None, in_features=k, out_features=n, has_bias=has_bias, **dtypes
    )
    kinds = "_".join([dtype, *dtypes.values()])
    name = f"linear_k{k}_n{n}_{kinds}_m{rows}{'_static' if static else ''}"
    return KernelCase(name, case, linear_inputs(case, rows), _checked(linear_reference(case)))


def cases() -> list[KernelCase]:
    """Returns the checks of this file."""
    found: list[KernelCase] = []
    shapes = (
        (128, 576, 1536, (1, 3, 8)),
        (32, 1536, 577, (1, 8)),
        (-1, 100, 37, (3,)),
        (64, 4096, 256, (1,)),
        (20, 131, 33, (3,)),
    )
    for bits in (2, 3, 4, 8):
        for group, k, n, static in shapes:
            found += [_quant(bits, group, k, n, rows, True) for rows in static]
            found += [_quant(bits, group, k, n, rows, False) for rows in (1, 3, 5, 17, 33, 64, 128, 257)]
        # Large enough for --benchmark to mean something.
        found += [_quant(bits, 128, 4096, 4096, 1, True), _quant(bits, 128, 4096, 4096, 512, False)]
        found += [_quant(bits, 128, 2048, 2304, rows, False) for rows in (5, 200)]
        # Several tiles per block and warp in turn, two tiles a warp with an odd one out, one scale per row.
        found += [_quant(bits, 128, 512, 34100, 1, True), _quant(bits, -1, 1032, 18000, 16, True)]
        found += [_quant(bits, 96, 1160, 4097, rows, True) for rows in (1, 3, 16)]
        found += [_quant(bits, 128, 14336, 4096, rows, True) for rows in (1, 4)]
        # K long enough for clusters that share it, few and many of them.
        found += [_quant(bits, 128, 14336, 520, rows, rows < 17) for rows in (5, 9, 17, 33, 64, 128, 257)]
        found += [_quant(bits, 64, 4104, 1999, rows, rows < 17) for rows in (11, 40, 300)]
        found += [_quant(bits, 256, 2048, 34100, 37, True), _quant(bits, 32, 4096, 3000, 520, False)]
        found += [_quant(bits, 7, 50, 19, 3, static) for static in (True, False)]
        found += [_quant(bits, 1, 33, 9, 1, True), _quant(bits, 128, 256, 65, 17, False, "float32")]
    for k, n, has_bias in ((576, 49153, False), (72, 37, True), (45, 33, True)):
        for rows, static in ((1, True), (4, True), (1, False), (17, False)):
            found.append(_linear(k, n, rows, static, has_bias, out_dtype="float32"))
        found.append(_linear(k, n, 3, True, has_bias))
    # Few rows: one tile and several in turn, whole turns of K and not, one and many warps to a tile.
    for k, n in ((4096, 6150), (14336, 2200), (1160, 34100), (64, 9)):
        found += [_linear(k, n, rows, True, rows % 2 == 0) for rows in (1, 2, 3, 4)]
    found += [_linear(k, n, rows, True, True) for k, n in ((4096, 2200), (576, 4999)) for rows in (5, 8, 11, 16)]
    found += [_linear(14336, 520, rows, True, True) for rows in (8, 16)]  # K in parts
    found += [_linear(576, 513, rows, False, True) for rows in (257, 3)]
    found += [_linear(100, 65, 17, False, True, dtype="float32"), _linear(100, 65, 2, True, False, dtype="float32")]
    return found
