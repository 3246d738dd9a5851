# SPDX-License-Identifier: Apache-2.0
"""Expressions shared by the sampling kernels of every target.

Sampling keeps the tokens whose logit is at least a threshold, so no sort is needed: the thresholds of top_k and top_p
are found by bisection on the bits of the float, which is exact. Probabilities are integers, round(exp((logit - max) /
temperature) * 2^30): integer sums do not depend on the order of addition, so a draw is the same whatever the number
of threads, and tokens 2^31 times less likely than the likeliest are never drawn.
"""

from __future__ import annotations

from typing import Any

from gptq_compile.kernels import tirx_math as tm
from gptq_compile.kernels.tvm_env import T

WEIGHT_ONE = 1 << 30
# Smallest finite float32.
LOWEST = -3.4028234663852886e38
# `key_of` minus infinity.
LEAST_KEY = -2139095041
# exp(-x) * 2^30 rounds to 0 for x > 31 ln(2) = 21.49.
WEIGHTLESS = 22.0
_INFINITY_BITS = 0x7F800000
_MAGNITUDE = 0x7FFFFFFF


def invalid(x: Any) -> Any:
    """1 where a float32 is NaN or +infinity, else 0 (int32); on the bits, since compilers fold ``x != x``."""
    bits = T.reinterpret("int32", x)
    is_nan = T.bitwise_and(bits, T.int32(_MAGNITUDE)) > T.int32(_INFINITY_BITS)
    return T.Select(T.Or(is_nan, bits == T.int32(_INFINITY_BITS)), T.int32(1), T.int32(0))


def key_of(x: Any) -> Any:
    """An int64 that orders like the float32 `x` (minus zero just below zero)."""
    bits = T.reinterpret("int32", x)
    return T.Cast("int64", T.bitwise_xor(bits, T.bitwise_and(bits >> 31, T.int32(_MAGNITUDE))))


def value_of(key: Any) -> Any:
    """The float32 whose `key_of` is `key`."""
    bits = T.Cast("int32", key)
    return T.reinterpret("float32", T.bitwise_xor(bits, T.bitwise_and(bits >> 31, T.int32(_MAGNITUDE))))


def _mix(x: Any) -> Any:
    """lowbias32 on the low 32 bits of a uint64 (64-bit products: TVM tells LLVM that 32-bit ones do not wrap)."""
    mask = T.uint64(0xFFFFFFFF)
    x = T.bitwise_and(T.bitwise_xor(x, x >> T.uint64(16)) * T.uint64(0x7FEB352D), mask)
    x = T.bitwise_and(T.bitwise_xor(x, x >> T.uint64(15)) * T.uint64(0x846CA68B), mask)
    return T.bitwise_xor(x, x >> T.uint64(16))


def random_bits(seed: Any, position: Any) -> Any:
    """The 24 random bits (int64) of a token: `reference.uniform` times 2^24."""
    mask = T.uint64(0xFFFFFFFF)
    seed64 = T.bitwise_and(T.Cast("uint64", T.Cast("int64", seed)), mask)
    position64 = T.bitwise_and(T.Cast("uint64", T.Cast("int64", position)), mask)
    first = _mix(T.bitwise_and(seed64 + T.uint64(0x9E3779B9), mask))
    return T.Cast("int64", _mix(_mix(T.bitwise_and(first + position64, mask))) >> T.uint64(8))


def draw_target(total: Any, bits: Any) -> Any:
    """floor(total * bits / 2^24) without overflow, for total < 2^62: the drawn point of the cumulative weights."""
    low = T.bitwise_and(total, T.int64((1 << 24) - 1))
    return (total >> 24) * bits + ((low * bits) >> 24)


def weight(x: Any, low: Any, top: Any, temperature: Any) -> Any:
    """The integer weight (int32) of a logit: 0 below `low`, else round(exp((x - top) / temperature) * 2^30)."""
    scaled = tm.exp((x - top) / temperature) * tm.f32(WEIGHT_ONE) + tm.f32(0.5)
    return T.Select(x >= low, T.Cast("int32", scaled), T.int32(0))


def wanted_mass(total: Any, top_p: Any) -> Any:
    """ceil(top_p * total), at least 1: the weight that the smallest kept set must reach."""
    product = T.Cast("float64", top_p) * T.Cast("float64", total)
    return T.max(T.Cast("int64", T.ceil(product)), T.int64(1))


def lightest_weight(min_p: Any) -> Any:
    """The smallest weight (int32) that min_p keeps: the largest weight is 2^30, so min_p * 2^30."""
    return T.Cast("int32", T.ceil(T.min(min_p, tm.f32(1.0)) * tm.f32(WEIGHT_ONE)))


def penalized(logit: Any, seen: Any, penalty: Any) -> Any:
    """A logit under the repetition penalty: divided when positive, multiplied otherwise, untouched when not seen."""
    changed = T.Select(logit > tm.f32(0.0), logit / penalty, logit * penalty)
    return T.Select(seen != T.uint8(0), changed, logit)


def kept(x: Any, low: Any, top: Any, temperature: Any, lightest: Any) -> Any:
    """The integer weight of a logit under both filters, 0 when it is dropped."""
    value = weight(x, low, top, temperature)
    return T.Select(value >= lightest, value, T.int32(0))
