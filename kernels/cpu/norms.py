# SPDX-License-Identifier: Apache-2.0
# TVMScript annotations are calls, which mypy does not take for types.
# mypy: disable-error-code="valid-type, no-redef"
"""RMSNorm and LayerNorm for the CPU: one row per task, float32 statistics, any mixture of types."""

from __future__ import annotations

from typing import Any

from gptq_compile.kernels import tirx_math as tm
from gptq_compile.kernels.norm_params import NormParams, refuse_norm
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
    p = NormParams.of(case)
    m, C, dtype, weight_dtype, out_dtype = tm.rows(case, "m"), p.channels, p.dtype, p.weight_dtype, p.out_dtype
    eps, offset, has_weight = p.eps, p.weight_offset, p.has_weight
    L = tm.lanes(C)
    loop = row_loop(case, C)

    @T.prim_func(s_tir=True)
    def rms_norm(
        x: T.Buffer((m, C), dtype),
        weight: T.Buffer((C,), weight_dtype),
        out: T.Buffer((m, C), out_dtype),
    ):
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
                            out_dtype,
                            T.Cast("float32", x[i, k * L + v])
                            * factor
                            * (T.Cast("float32", weight[k * L + v]) + T.float32(offset)),
                        )
                    else:
                        out[i, k * L + v] = T.Cast(out_dtype, T.Cast("float32", x[i, k * L + v]) * factor)

    return tm.without_params(rms_norm, p.absent)


def _layer_norm(case: Case, target: Target) -> Any:
    """(x - mean) * rsqrt(var + eps) * weight + bias, biased variance in a second pass (Ba et al. 2016, eq. 4)."""
    p = NormParams.of(case)
    m, C, dtype, weight_dtype, out_dtype = tm.rows(case, "m"), p.channels, p.dtype, p.weight_dtype, p.out_dtype
    eps, has_weight, has_bias = p.eps, p.has_weight, p.has_bias
    L = tm.lanes(C)
    loop = row_loop(case, C)

    @T.prim_func(s_tir=True)
    def layer_norm(
        x: T.Buffer((m, C), dtype),
        weight: T.Buffer((C,), weight_dtype),
        bias: T.Buffer((C,), weight_dtype),
        out: T.Buffer((m, C), out_dtype),
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
                    out[i, k * L + v] = T.Cast(out_dtype, y[v])

    return tm.without_params(layer_norm, p.absent)


KERNELS = (
    Kernel("cpu.rms_norm", "rms_norm", lambda case, target: refuse_norm(case), _rms_norm),
    Kernel("cpu.layer_norm", "layer_norm", lambda case, target: refuse_norm(case), _layer_norm),
)
