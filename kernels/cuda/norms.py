# SPDX-License-Identifier: Apache-2.0
# TVMScript annotations are calls, which mypy does not take for types.
# mypy: disable-error-code="valid-type, no-redef"
"""RMSNorm and LayerNorm for CUDA: one block per row, the row in registers, float32 statistics."""

from __future__ import annotations

from typing import Any

from gptq_compile.kernels import tirx_math as tm
from gptq_compile.kernels.attention_params import refuse_dtype
from gptq_compile.kernels.cuda.block import WARP, block_sum
from gptq_compile.kernels.registry import Case, Kernel
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import T

_MOST_THREADS = 1024
# Chunks of 16 bytes a thread should hold before the block grows.
_CHUNKS_PER_THREAD = 2


def vector_width(size: int, dtype: str) -> int:
    """Returns how many elements one load of at most 16 bytes may take from rows of `size` elements."""
    return tm.lanes(size, 8 if dtype == "float16" else 4)


def _geometry(channels: int, dtype: str) -> tuple[int, int, int]:
    """Returns (elements per load, threads, loads per thread) for a row."""
    width = vector_width(channels, dtype)
    chunks = channels // width
    threads = -(-chunks // (_CHUNKS_PER_THREAD * WARP)) * WARP
    threads = min(_MOST_THREADS, threads)
    return width, threads, -(-chunks // threads)


def _norm(case: Case, centered: bool, has_weight: bool, has_bias: bool, offset: float) -> Any:
    m, C, dtype, eps = tm.rows(case, "m"), int(case["channels"]), case.dtype, float(case["eps"])
    L, threads, loads = _geometry(C, dtype)

    @T.prim_func(s_tir=True)
    def norm(
        x: T.Buffer((m, C), dtype),
        weight: T.Buffer((C,), dtype),
        bias: T.Buffer((C,), dtype),
        out: T.Buffer((m, C), dtype),
    ):
        for row in T.thread_binding(m, thread="blockIdx.x"):
            for tx in T.thread_binding(threads, thread="threadIdx.x"):
                shared = T.alloc_buffer((threads // WARP,), "float32", scope="shared")
                packed = T.alloc_buffer((L,), dtype, scope="local")
                values = T.alloc_buffer((loads * L,), "float32", scope="local")
                mean = T.alloc_buffer((1,), "float32", scope="local")
                total = T.alloc_buffer((1,), "float32", scope="local")
                mean[0] = T.float32(0)
                total[0] = T.float32(0)
                for i in T.unroll(loads):
                    if (i * threads + tx) * L < C:
                        for v in T.vectorized(L):
                            packed[v] = x[row, (i * threads + tx) * L + v]
                        for v in T.unroll(L):
                            values[i * L + v] = T.Cast("float32", packed[v])
                            mean[0] = mean[0] + values[i * L + v]
                if centered:
                    block_sum(mean, shared, tx, threads)
                    mean[0] = mean[0] * T.float32(1.0 / C)
                else:
                    mean[0] = T.float32(0)
                for i in T.unroll(loads):
                    if (i * threads + tx) * L < C:
                        for v in T.unroll(L):
                            values[i * L + v] = values[i * L + v] - mean[0]
                            total[0] = total[0] + values[i * L + v] * values[i * L + v]
                block_sum(total, shared, tx, threads)
                total[0] = T.rsqrt(total[0] * T.float32(1.0 / C) + T.float32(eps))
                for i in T.unroll(loads):
                    if (i * threads + tx) * L < C:
                        for v in T.unroll(L):
                            values[i * L + v] = values[i * L + v] * total[0]
                        if has_weight:
                            for v in T.vectorized(L):
                                packed[v] = weight[(i * threads + tx) * L + v]
                            for v in T.unroll(L):
                                values[i * L + v] = values[i * L + v] * (
                                    T.Cast("float32", packed[v]) + T.float32(offset)
                                )
                        if has_bias:
                            for v in T.vectorized(L):
                                packed[v] = bias[(i * threads + tx) * L + v]
                            for v in T.unroll(L):
                                values[i * L + v] = values[i * L + v] + T.Cast("float32", packed[v])
                        for v in T.unroll(L):
                            packed[v] = T.Cast(dtype, values[i * L + v])
                        for v in T.vectorized(L):
                            out[row, (i * threads + tx) * L + v] = packed[v]

    absent = [name for name, present in (("weight", has_weight), ("bias", has_bias)) if not present]
    return tm.without_params(norm, absent).with_attr("global_symbol", case.op)


def _rms_norm(case: Case, target: Target) -> Any:
    """x * rsqrt(mean(x^2) + eps) * (weight + weight_offset)  (Zhang and Sennrich 2019, eq. 4)."""
    return _norm(case, False, bool(case.get("has_weight", True)), False, float(case.get("weight_offset", 0.0)))


def _layer_norm(case: Case, target: Target) -> Any:
    """(x - mean) * rsqrt(var + eps) * weight + bias, biased variance in a second pass (Ba et al. 2016, eq. 4)."""
    return _norm(case, True, bool(case.get("has_weight", True)), bool(case.get("has_bias", True)), 0.0)


KERNELS = (
    Kernel("cuda.rms_norm", "rms_norm", lambda case, target: refuse_dtype(case), _rms_norm),
    Kernel("cuda.layer_norm", "layer_norm", lambda case, target: refuse_dtype(case), _layer_norm),
)
