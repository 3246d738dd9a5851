# SPDX-License-Identifier: Apache-2.0
"""Scalar and vector float32 functions as TIR expressions, and small conveniences for writing PrimFuncs.

LLVM has no vector exp, tanh or erf of its own: `T.exp` in a vectorized loop becomes one libm call per lane. The
functions here are polynomials made of additions, multiplications and bit moves, which vectorize to any width.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from gptq_compile.kernels.registry import Case
from gptq_compile.kernels.tvm_env import T, tvm

_EXP_HIGH = 88.0
_EXP_LOW = -87.0
# Minimax polynomial of (exp(r) - 1 - r) / r^2 on |r| <= ln(2)/2, highest degree first (Cephes expf).
_EXP_POLY = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
# ln(2) in two parts, so that n * ln(2) subtracts without rounding for |n| < 2^13 (Cody and Waite).
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# Abramowitz and Stegun, Handbook of Mathematical Functions, eq. 7.1.26: |error| <= 1.5e-7.
_ERF_POLY = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
_ERF_P = 0.3275911


def f32(value: float) -> Any:
    """Returns a float32 constant."""
    return T.float32(value)


def exp(x: Any) -> Any:
    """exp(x) for a float32 expression: 2 ulp; exactly 0 below -87, and exp(88) above 88."""
    y = T.min(T.max(x, f32(_EXP_LOW)), f32(_EXP_HIGH))
    n = T.floor(y * f32(math.log2(math.e)) + f32(0.5))
    r = y - n * f32(_LN2_HIGH) - n * f32(_LN2_LOW)
    poly = f32(_EXP_POLY[0])
    for coefficient in _EXP_POLY[1:]:
        poly = poly * r + f32(coefficient)
    mantissa = poly * r * r + r + f32(1.0)
    power = T.reinterpret("float32", (T.Cast("int32", n) + 127) << 23)
    return T.Select(x < f32(_EXP_LOW), f32(0.0), mantissa * power)


def tanh(x: Any) -> Any:
    """tanh(x) for a float32 expression: absolute error below 2e-7."""
    e = exp(f32(-2.0) * T.abs(x))
    magnitude = (f32(1.0) - e) / (f32(1.0) + e)
    return T.Select(x < f32(0.0), f32(0.0) - magnitude, magnitude)


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)) for a float32 expression."""
    return f32(1.0) / (f32(1.0) + exp(f32(0.0) - x))


def erf(x: Any) -> Any:
    """erf(x) for a float32 expression: absolute error below 3e-7."""
    a = T.abs(x)
    t = f32(1.0) / (f32(1.0) + f32(_ERF_P) * a)
    poly = f32(_ERF_POLY[0])
    for coefficient in _ERF_POLY[1:]:
        poly = poly * t + f32(coefficient)
    magnitude = f32(1.0) - poly * t * exp(f32(0.0) - a * a)
    return T.Select(x < f32(0.0), f32(0.0) - magnitude, magnitude)


def rows(case: Case, name: str = "n") -> Any:
    """Returns the number of rows of `case`: an int, or a fresh symbolic int64 variable."""
    return case.rows if case.rows is not None else tvm.tirx.Var(name, "int64")


def symbol(name: str) -> Any:
    """Returns a fresh symbolic int64 dimension."""
    return tvm.tirx.Var(name, "int64")


def lanes(size: int, most: int = 8) -> int:
    """Returns the widest power-of-two vector, at most `most` lanes, that divides `size`."""
    width = most
    while size % width:
        width //= 2
    return width


def without_params(func: Any, names: Collection[str]) -> Any:
    """Returns `func` without the parameters `names`, whose buffers its body must not touch.

    TVMScript signatures are fixed; optional inputs are written as parameters, their uses guarded by Python `if`s that
    are decided while parsing, and the absent ones removed here.
    """
    params = [param for param in func.params if param.name not in names]
    return tvm.tirx.PrimFunc(params, func.body, func.ret_type, func.attrs)
