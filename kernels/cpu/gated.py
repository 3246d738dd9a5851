# SPDX-License-Identifier: Apache-2.0
# TVMScript annotations are calls, which mypy does not take for types.
# mypy: disable-error-code="valid-type, no-redef"
"""act(gate) * up for the CPU (Shazeer 2020, section 2)."""

from __future__ import annotations

from typing import Any

from gptq_compile.kernels import tirx_math as tm
from gptq_compile.kernels.activations import ACTIVATIONS, refuse_activation
from gptq_compile.kernels.attention_params import refuse_dtype
from gptq_compile.kernels.cpu.norms import row_loop
from gptq_compile.kernels.registry import Case, Kernel, Refusal
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import T


def _gated(case: Case, target: Target) -> Any:
    m, F, dtype = tm.rows(case, "m"), int(case["features"]), case.dtype
    act = ACTIVATIONS[case["act"]]
    out_dtype = str(case.get("out_dtype", dtype))
    L = tm.lanes(F)
    loop = row_loop(case, F)

    @T.prim_func(s_tir=True)
    def gated_act(gate: T.Buffer((m, F), dtype), up: T.Buffer((m, F), dtype), out: T.Buffer((m, F), out_dtype)):
        for i in loop(m):
            for k in range(F // L):
                for v in T.vectorized(L):
                    out[i, k * L + v] = T.Cast(
                        out_dtype, act(T.Cast("float32", gate[i, k * L + v])) * T.Cast("float32", up[i, k * L + v])
                    )

    return gated_act


def _accepts(case: Case, target: Target) -> Refusal | None:
    if case.get("width") is not None:
        return Refusal("takes factors in tensors of their own")
    return refuse_activation(case) or refuse_dtype(case)


KERNELS = (Kernel("cpu.gated_act", "gated_act", _accepts, _gated),)
