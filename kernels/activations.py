# SPDX-License-Identifier: Apache-2.0
"""Activation functions as float32 TIR expressions; add one here (and in reference.py) and every kernel has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from gptq_compile.kernels import tirx_math as tm
from gptq_compile.kernels.registry import Case, Refusal
from gptq_compile.kernels.tvm_env import T


def _gelu_tanh(x: Any) -> Any:
    """Hendrycks and Gimpel 2016, section 2: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    inner = tm.f32(math.sqrt(2.0 / math.pi)) * (x + tm.f32(0.044715) * x * x * x)
    return tm.f32(0.5) * x * (tm.f32(1.0) + tm.tanh(inner))


def _relu(x: Any) -> Any:
    return T.max(x, tm.f32(0.0))


ACTIVATIONS: Mapping[str, Callable[[Any], Any]] = {
    "silu": lambda x: x * tm.sigmoid(x),
    "gelu": lambda x: tm.f32(0.5) * x * (tm.f32(1.0) + tm.erf(x * tm.f32(math.sqrt(0.5)))),
    "gelu_tanh": _gelu_tanh,
    "gelu_quick": lambda x: x * tm.sigmoid(tm.f32(1.702) * x),
    "relu": _relu,
    "relu2": lambda x: _relu(x) * _relu(x),
    "sigmoid": tm.sigmoid,
    "tanh": tm.tanh,
    "identity": lambda x: x,
}


def refuse_activation(case: Case) -> Refusal | None:
    """Refuses activation names that are not in `ACTIVATIONS`."""
    if case["act"] not in ACTIVATIONS:
        return Refusal(f"activation {case['act']!r} is not one of {', '.join(sorted(ACTIVATIONS))}")
    return None
