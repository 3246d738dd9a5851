# SPDX-License-Identifier: Apache-2.0
"""One case of an op: its arguments, what they must hold after the call, and the comparison. Needs numpy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gptq_compile.kernels.registry import Case

Arguments = list[np.ndarray]
PAGE = 16
SIZES = (1, 3, 17, 257)
# Tokens of a static decode batch.
STATIC_SIZES = (1, 3)
TOLERANCE = {"float32": 2e-5, "float16": 4e-3}


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


def normal(rng: np.random.Generator, shape: Sequence[int], dtype: str, scale: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(shape) * scale).astype(dtype)


def poison(shape: Sequence[int], dtype: str) -> np.ndarray:
    return np.full(shape, np.nan, dtype) if dtype.startswith("float") else np.full(shape, -77, dtype)


def op_case(name, op, dtype, rows, attrs, make, expect, tolerance=None) -> OpCase:
    sizes = SIZES if rows is None else (rows,)
    return OpCase(name, Case.make(op, dtype, rows, **attrs), make, expect, sizes, tolerance or TOLERANCE[dtype])
