# SPDX-License-Identifier: Apache-2.0
# TVMScript annotations are calls, which mypy does not take for types.
# mypy: disable-error-code="valid-type, no-redef"
"""RMSNorm and LayerNorm for CUDA: one block per row, the row in registers, float32 statistics, any mixture of types."""

from __future__ import annotations

from typing import Any

from gptq_compile.kernels import tirx_math as tm
from gptq_compile.kernels.cuda.block import WARP, block_sum
from gptq_compile.kernels.norm_params import NormParams, refuse_norm
from gptq_compile.kernels.registry import Case, Kernel
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import T

_MOST_THREADS = 1024
# Chunks of 16 bytes a thread should hold before the block grows.
_CHUNKS_PER_THREAD = 2


def vector_width(size: int, *dtypes: str) -> int:
    """Returns how many elements one load of at most 16 bytes may take from rows of `size` elements of any `dtypes`."""
    return tm.lanes(size, 8 if set(dtypes) == {"float16"} else 4)


def _geometry(channels: int, *dtypes: str) -> tuple[int, int, int]:
    """Returns (elements per load, threads, loads per thread) for rows in `dtypes` that one thread walks together."""
    width = vector_width(channels, *dtypes)
    chunks = channels // width
    threads = -(-chunks // (_CHUNKS_PER_THREAD * WARP)) * WARP
    threads = min(_MOST_THREADS, threads)
    return width, threads, -(-chunks // threads)


def _norm(case: Case, centered: bool) -> Any:
    p = NormParams.of(case)
    m, C, dtype, weight_dtype, out_dtype = tm.rows(case, "m"), p.channels, p.dtype, p.weight_dtype, p.out_dtype
    eps, offset, has_weight, has_bias = p.eps, p.weight_offset, p.has_weight, p.has_bias
    L, threads, loads = _geometry(C, *p.dtypes)

    @T.prim_func(s_tir=True)
    def norm(
        x: T.Buffer((m, C), dtype),
        weight: T.Buffer((C,), weight_dtype),
        bias: T.Buffer((C,), weight_dtype),
        out: T.Buffer((m, C), out_dtype),
    ):
        for row in T.thread_binding(m, thread="blockIdx.x"):
            for tx in T.thread_binding(threads, thread="threadIdx.x"):
                shared = T.alloc_buffer((threads // WARP,), "float32", scope="shared")
                packed = T.alloc_buffer((L,), dtype, scope="local")
                packed_weight = T.alloc_buffer((L,), weight_dtype, scope="local")
                packed_out = T.alloc_buffer((L,), out_dtype, scope="local")
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
                                packed_weight[v] = weight[(i * threads + tx) * L + v]
                            for v in T.unroll(L):
                                values[i * L + v] = values[i * L + v] * (
                                    T.Cast("float32", packed_weight[v]) + T.float32(offset)
                                )
                        if has_bias:
                            for v in T.vectorized(L):
                                packed_weight[v] = bias[(i * threads + tx) * L + v]
                            for v in T.unroll(L):
                                values[i * L + v] = values[i * L + v] + T.Cast("float32", packed_weight[v])
                        for v in T.unroll(L):
                            packed_out[v] = T.Cast(out_dtype, values[i * L + v])
                        for v in T.vectorized(L):
                            out[row, (i * threads + tx) * L + v] = packed_out[v]

    return tm.without_params(norm, p.absent).with_attr("global_symbol", case.op)


def _rms_norm(case: Case, target: Target) -> Any:
    """x * rsqrt(mean(x^2) + eps) * (weight + weight_offset)  (Zhang and Sennrich 2019, eq. 4)."""
    return _norm(case, centered=False)


def _layer_norm(case: Case, target: Target) -> Any:
    """(x - mean) * rsqrt(var + eps) * weight + bias, biased variance in a second pass (Ba et al. 2016, eq. 4)."""
    return _norm(case, centered=True)


KERNELS = (
    Kernel("cuda.rms_norm", "rms_norm", lambda case, target: refuse_norm(case), _rms_norm),
    Kernel("cuda.layer_norm", "layer_norm", lambda case, target: refuse_norm(case), _layer_norm),
)
