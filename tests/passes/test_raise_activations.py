# SPDX-License-Identifier: Apache-2.0
"""raise_activations: activations by hand, gated activations, and near-misses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from gptq_compile.passes.manager import PassManager
from gptq_compile.passes.raise_activations import RaiseActivations

C = math.sqrt(2 / math.pi)
UP = torch.linspace(-1, 1, 256).reshape(16, 16)


def _raise(program):
    manager = PassManager([RaiseActivations()])
    manager.run(program)
    return manager.records[0]


BY_HAND = {
    "gpt2": (lambda x: 0.5 * x * (1.0 + torch.tanh(C * (x + 0.044715 * torch.pow(x, 3)))), "tanh"),
    "bloom": (lambda x: x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))), "tanh"),
    "expanded": (lambda x: 0.5 * x + torch.tanh(C * x + C * 0.044715 * x * x * x) * x / 2, "tanh"),
    "of a sum": (lambda x: 0.5 * (x + 1) * (1.0 + torch.tanh(C * ((x + 1) + 0.044715 * (x + 1) ** 3))), None),
    "erf": (lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), "none"),
    "silu": (lambda x: x * torch.sigmoid(x), "silu"),
}


@pytest.mark.parametrize("form", BY_HAND)
def test_activations_by_hand(small, form):
    spelled, kind = BY_HAND[form]
    program = small.program(lambda p, x, _: spelled(x))
    if kind is None:  # the argument is itself arithmetic, and spelled three times until duplicates are merged
        from gptq_compile.passes.common import merge_duplicates

        merge_duplicates(program)
    assert _raise(program).modified
    assert small.ops(program)[-1] == ("silu" if kind == "silu" else "gelu")
    line = small.text(program)[-3]
    assert ("approximate='tanh'" in line) == (kind in ("tanh", None))
    assert not _raise(program).modified


NEAR_MISSES = {
    "other coefficient": lambda x: 0.5 * x * (1.0 + torch.tanh(C * (x + 0.0447 * x * x * x))),
    "no half": lambda x: x * (1.0 + torch.tanh(C * (x + 0.044715 * x * x * x))),
    "minus": lambda x: 0.5 * x * (1.0 - torch.tanh(C * (x + 0.044715 * x * x * x))),
    "erf of x": lambda x: x * 0.5 * (1.0 + torch.erf(x)),
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x) + x,
    "softcap": lambda x: 30.0 * torch.tanh(x / 30.0),
}


@pytest.mark.parametrize("form", NEAR_MISSES)
def test_near_misses_are_no_activation(small, form):
    program = small.program(lambda p, x, _: NEAR_MISSES[form](x))
    _raise(program)
    assert not {"gelu", "silu"} & set(small.ops(program))


GATES = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("act", GATES)
@pytest.mark.parametrize("swapped", [False, True])
def test_gated(small, act, swapped):
    def body(p, x, _):
        gate, up = GATES[act](x), F.linear(x, p.up)
        return up * gate if swapped else gate * up

    program = small.program(body, up=UP)
    assert _raise(program).modified
    assert small.text(program)[1:3] == [
        "%1: f32[1, n, 16] = aten.linear.default(%0, up)",
        f"%2: f32[1, n, 16] = gptq_compile.gated_act.default(%0, %1, '{act}')",
    ]


UNGATED = {
    "a parameter": lambda p, x: F.silu(x) * p.scale,
    "a broadcast": lambda p, x: torch.sigmoid(x[..., :1]) * x,
    "a number": lambda p, x: F.silu(x) * 2.0,
    "read twice": lambda p, x: (lambda g: g * F.linear(x, p.up) + g)(F.silu(x)),
}


@pytest.mark.parametrize("form", UNGATED)
def test_products_that_are_no_gate(small, form):
    program = small.program(lambda p, x, _: UNGATED[form](p, x), up=UP, scale=torch.ones(16))
    _raise(program)
    assert "gated_act" not in small.ops(program)
