# SPDX-License-Identifier: Apache-2.0
# TVMScript annotations are calls, which mypy does not take for types.
# mypy: disable-error-code="valid-type, no-redef"
"""RMSNorm and LayerNorm for the CPU: one row per task, float32 statistics."""

from __future__ import annotations

from typing import Any

from gptq_compile.kernels import tirx_math as tm
from gptq_compile.kernels.attention_params import refuse_dtype
from gptq_compile.kernels.registry import Case, Kernel
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import T

# Below this many elements a parallel launch costs more than it saves.
SERIAL_ELEMENTS = 1 << 15


def row_loop(case: Case, width: int) -> Any:
    """Returns `T.serial` for small static cases, else `T.parallel`."""
    return T.serial if case.rows is not None and case.rows * width <= SERIAL_ELEMENTS else T.parallel


def _rms_norm(case: Case, target: Target) -> Any:
    """x * rsqrt(mean(x^2) + eps) * (weight + weight_offset)  (Zhang and Sennrich 2019, eq. 4)."""
    m, C, dtype = tm.rows(case, "m"), int(case["channels"]), case.dtype
    eps, offset = float(case["eps"]), float(case.get("weight_offset", 0.0))
    has_weight = bool(case.get("has_weight", True))
    L = tm.lanes(C)
    loop = row_loop(case, C)

    @T.prim_func(s_tir=True)
    def rms_norm(x: T.Buffer((m, C), dtype), weight: T.Buffer((C,), dtype), out: T.Buffer((m, C), dtype)):
        for i in loop(m):
            acc = T.alloc_buffer((L,), "float32")
            for v in T.vectorized(L):
                acc[v] = T.float32(0)
            for k in range(C // L):
                for v in T.vectorized(L):
                    acc[v] = acc[v] + T.Cast("float32", x[i, k * L + v]) * T.Cast("float32", x[i, k * L + v])
            total: T.float32 = T.float32(0)
            for v in T.unroll(L):
                total = total + acc[v]
            factor: T.let[T.float32] = T.float32(1) / T.sqrt(total * T.float32(1.0 / C) + T.float32(eps))
            for k in range(C // L):
                for v in T.vectorized(L):
                    if has_weight:
                        out[i, k * L + v] = T.Cast(
                            dtype,
                            T.Cast("float32", x[i, k * L + v])
                            * factor
                            * (T.Cast("float32", weight[k * L + v]) + T.float32(offset)),
                        )
                    else:
                        out[i, k * L + v] = T.Cast(dtype, T.Cast("float32", x[i, k * L + v]) * factor)

    return tm.without_params(rms_norm, () if has_weight else ("weight",))


def _layer_norm(case: Case, target: Target) -> Any:
    """(x - mean) * rsqrt(var + eps) * weight + bias, biased variance in a second pass (Ba et al. 2016, eq. 4)."""
    m, C, dtype = tm.rows(case, "m"), int(case["channels"]), case.dtype
    eps = float(case["eps"])
    has_weight, has_bias = bool(case.get("has_weight", True)), bool(case.get("has_bias", True))
    L = tm.lanes(C)
    loop = row_loop(case, C)

    @T.prim_func(s_tir=True)
    def layer_norm(
        x: T.Buffer((m, C), dtype),
        weight: T.Buffer((C,), dtype),
        bias: T.Buffer((C,), dtype),
        out: T.Buffer((m, C), dtype),
    ):
        for i in loop(m):
            acc = T.alloc_buffer((L,), "float32")
            y = T.alloc_buffer((L,), "float32")
            mean: T.float32 = T.float32(0)
            total: T.float32 = T.float32(0)
            for v in T.vectorized(L):
                acc[v] = T.float32(0)
            for k in range(C // L):
                for v in T.vectorized(L):
                    acc[v] = acc[v] + T.Cast("float32", x[i, k * L + v])
            for v in T.unroll(L):
                mean = mean + acc[v]
            mean = mean * T.float32(1.0 / C)
            for v in T.vectorized(L):
                acc[v] = T.float32(0)
            for k in range(C // L):
                for v in T.vectorized(L):
                    y[v] = T.Cast("float32", x[i, k * L + v]) - mean
                for v in T.vectorized(L):
                    acc[v] = acc[v] + y[v] * y[v]
            for v in T.unroll(L):
                total = total + acc[v]
            factor: T.let[T.float32] = T.float32(1) / T.sqrt(total * T.float32(1.0 / C) + T.float32(eps))
            for k in range(C // L):
                for v in T.vectorized(L):
                    y[v] = (T.Cast("float32", x[i, k * L + v]) - mean) * factor
                if has_weight:
                    for v in T.vectorized(L):
                        y[v] = y[v] * T.Cast("float32", weight[k * L + v])
                if has_bias:
                    for v in T.vectorized(L):
                        y[v] = y[v] + T.Cast("float32", bias[k * L + v])
                for v in T.vectorized(L):
                    out[i, k * L + v] = T.Cast(dtype, y[v])

    absent = [name for name, present in (("weight", has_weight), ("bias", has_bias)) if not present]
    return tm.without_params(layer_norm, absent)


KERNELS = (
    Kernel("cpu.rms_norm", "rms_norm", lambda case, target: refuse_dtype(case), _rms_norm),
    Kernel("cpu.layer_norm", "layer_norm", lambda case, target: refuse_dtype(case), _layer_norm),
)
