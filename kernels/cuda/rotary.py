# SPDX-License-Identifier: Apache-2.0
# TVMScript annotations are calls, which mypy does not take for types.
# mypy: disable-error-code="valid-type, no-redef"
"""Rotary position embedding for CUDA (Su et al. 2021, eq. 34): one block per token."""

from __future__ import annotations

from typing import Any

from gptq_compile.kernels import tirx_math as tm
from gptq_compile.kernels.attention_params import refuse_rotary
from gptq_compile.kernels.registry import Case, Kernel
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import T

_THREADS = 128


def _rotary(case: Case, target: Target) -> Any:
    """One thread per pair: (i, i + R/2), or (2i, 2i + 1) when interleaved; the rest of a head is copied.

    With a ``width``, x is rows of so many features: feature d of head h is at ``at + h * apart + d``.
    """
    n, H, D, dtype = tm.rows(case), int(case["heads"]), int(case["head_dim"]), case.dtype
    R, table_dtype = int(case.get("rotary_dim", D)), str(case.get("table_dtype", dtype))
    out_dtype = str(case.get("out_dtype", dtype))
    interleaved = bool(case.get("interleaved", False))
    half, rest = R // 2, D - R
    width, at, apart = (int(case.get(key, 0)) for key in ("width", "at", "apart"))
    shape = (n, width) if width else (n, H, D)

    def place(token: Any, head: Any, feature: Any) -> tuple[Any, ...]:
        return (token, at + head * apart + feature) if width else (token, head, feature)

    @T.prim_func(s_tir=True)
    def rotary_embedding(
        x: T.Buffer(shape, dtype),
        cos: T.Buffer((n, R), table_dtype),
        sin: T.Buffer((n, R), table_dtype),
        out: T.Buffer((n, H, D), out_dtype),
    ):
        for t in T.thread_binding(n, thread="blockIdx.x"):
            for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                for step in range((H * half + _THREADS - 1) // _THREADS):
                    pair: T.let[T.int32] = step * _THREADS + tx
                    if pair < H * half:
                        h: T.let[T.int32] = pair // half
                        a: T.let[T.int32] = 2 * (pair % half) if interleaved else pair % half
                        b: T.let[T.int32] = a + 1 if interleaved else a + half
                        xa: T.let[T.float32] = T.Cast("float32", x[place(t, h, a)])
                        xb: T.let[T.float32] = T.Cast("float32", x[place(t, h, b)])
                        out[t, h, a] = T.Cast(
                            out_dtype, xa * T.Cast("float32", cos[t, a]) - xb * T.Cast("float32", sin[t, a])
                        )
                        out[t, h, b] = T.Cast(
                            out_dtype, xb * T.Cast("float32", cos[t, b]) + xa * T.Cast("float32", sin[t, b])
                        )
                if rest > 0:
                    for step in range((H * rest + _THREADS - 1) // _THREADS):
                        element: T.let[T.int32] = step * _THREADS + tx
                        if element < H * rest:
                            out[t, element // rest, R + element % rest] = T.Cast(
                                out_dtype, x[place(t, element // rest, R + element % rest)]
                            )

    return rotary_embedding


KERNELS = (Kernel("cuda.rotary_embedding", "rotary_embedding", lambda case, target: refuse_rotary(case), _rotary),)
