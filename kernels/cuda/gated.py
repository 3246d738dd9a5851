# SPDX-License-Identifier: Apache-2.0
# TVMScript annotations are calls, which mypy does not take for types.
# mypy: disable-error-code="valid-type, no-redef"
"""act(gate) * up for CUDA (Shazeer 2020, section 2): one thread per 16 bytes of a row."""

from __future__ import annotations

import math
from typing import Any

from gptq_compile.kernels import tirx_math as tm
from gptq_compile.kernels.activations import ACTIVATIONS, refuse_activation
from gptq_compile.kernels.attention_params import refuse_dtype
from gptq_compile.kernels.cuda.norms import vector_width
from gptq_compile.kernels.registry import Case, Kernel
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import T

_THREADS = 128


def _gated(case: Case, target: Target) -> Any:
    """Factors begin at features `at` and `up_at` of rows of `width` and `up_width`; by default of their own tensors."""
    m, F, dtype = tm.rows(case, "m"), int(case["features"]), case.dtype
    out_dtype = str(case.get("out_dtype", dtype))
    act = ACTIVATIONS[case["act"]]
    W, at, UW, up_at = (int(case.get(*pair)) for pair in (("width", F), ("at", 0), ("up_width", F), ("up_at", 0)))
    L = vector_width(math.gcd(F, W, at, UW, up_at), dtype)
    chunks = F // L

    @T.prim_func(s_tir=True)
    def gated_act(gate: T.Buffer((m, W), dtype), up: T.Buffer((m, UW), dtype), out: T.Buffer((m, F), out_dtype)):
        for row in T.thread_binding(m, thread="blockIdx.x"):
            for by in T.thread_binding((chunks + _THREADS - 1) // _THREADS, thread="blockIdx.y"):
                for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                    if by * _THREADS + tx < chunks:
                        a = T.alloc_buffer((L,), dtype, scope="local")
                        b = T.alloc_buffer((L,), dtype, scope="local")
                        c = T.alloc_buffer((L,), out_dtype, scope="local")
                        for v in T.vectorized(L):
                            a[v] = gate[row, at + (by * _THREADS + tx) * L + v]
                        for v in T.vectorized(L):
                            b[v] = up[row, up_at + (by * _THREADS + tx) * L + v]
                        for v in T.unroll(L):
                            c[v] = T.Cast(out_dtype, act(T.Cast("float32", a[v])) * T.Cast("float32", b[v]))
                        for v in T.vectorized(L):
                            out[row, (by * _THREADS + tx) * L + v] = c[v]

    return gated_act


KERNELS = (
    Kernel("cuda.gated_act", "gated_act", lambda case, target: refuse_activation(case) or refuse_dtype(case), _gated),
)
