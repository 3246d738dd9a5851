# SPDX-License-Identifier: Apache-2.0
# TVMScript annotations are calls, which mypy does not take for types.
# mypy: disable-error-code="valid-type, no-redef"
"""Rotary position embedding for the CPU (Su et al. 2021, eq. 34)."""

from __future__ import annotations

from typing import Any

from gptq_compile.kernels import tirx_math as tm
from gptq_compile.kernels.attention_params import refuse_rotary
from gptq_compile.kernels.cpu.norms import row_loop
from gptq_compile.kernels.registry import Case, Kernel, Refusal
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import T


def _rotary(case: Case, target: Target) -> Any:
    """One token per task. Pairs are (i, i + R/2), or (2i, 2i + 1) when interleaved; the rest of a head is copied."""
    n, H, D, dtype = tm.rows(case), int(case["heads"]), int(case["head_dim"]), case.dtype
    R, table_dtype = int(case.get("rotary_dim", D)), str(case.get("table_dtype", dtype))
    out_dtype = str(case.get("out_dtype", dtype))
    interleaved = bool(case.get("interleaved", False))
    half = R // 2
    L, CL = tm.lanes(half), tm.lanes(D - R) if D > R else 1
    loop = row_loop(case, H * D)

    @T.prim_func(s_tir=True)
    def rotary_embedding(
        x: T.Buffer((n, H, D), dtype),
        cos: T.Buffer((n, R), table_dtype),
        sin: T.Buffer((n, R), table_dtype),
        out: T.Buffer((n, H, D), out_dtype),
    ):
        for t in loop(n):
            for h in range(H):
                for i in range(half // L):
                    for v in T.vectorized(L):
                        a = T.meta_var(2 * (i * L + v) if interleaved else i * L + v)
                        b = T.meta_var(2 * (i * L + v) + 1 if interleaved else half + i * L + v)
                        out[t, h, a] = T.Cast(
                            out_dtype,
                            T.Cast("float32", x[t, h, a]) * T.Cast("float32", cos[t, a])
                            - T.Cast("float32", x[t, h, b]) * T.Cast("float32", sin[t, a]),
                        )
                        out[t, h, b] = T.Cast(
                            out_dtype,
                            T.Cast("float32", x[t, h, b]) * T.Cast("float32", cos[t, b])
                            + T.Cast("float32", x[t, h, a]) * T.Cast("float32", sin[t, b]),
                        )
                for i in range((D - R) // CL):
                    for v in T.vectorized(CL):
                        out[t, h, R + i * CL + v] = T.Cast(out_dtype, x[t, h, R + i * CL + v])

    return rotary_embedding


def _accepts(case: Case, target: Target) -> Refusal | None:
    if case.get("width") is not None:
        return Refusal("reads heads that lie by themselves, not in wider rows")
    return refuse_rotary(case)


KERNELS = (Kernel("cpu.rotary_embedding", "rotary_embedding", _accepts, _rotary),)
