# SPDX-License-Identifier: Apache-2.0
"""raise_norms: every spelling matches, and what only looks like a norm does not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gptq_compile.passes.manager import PassManager
from gptq_compile.passes.raise_norms import RaiseNorms
from gptq_compile.passes.raise_ops import RaiseOps

EPS = 1e-5
WEIGHT = torch.linspace(0.5, 1.5, 16)
BIAS = torch.linspace(-1, 1, 16)
ONE = "gptq_compile.rms_norm.default"


def _raise(program, step=None):
    manager = PassManager([step or RaiseNorms()])
    manager.run(program)  # validates the meaning and verifies the IR
    return manager.records[0]


SPELLINGS = {
    "rsqrt": lambda p, x, _: p.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)),
    "weight last": lambda p, x, _: (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS)) * p.w,
    "weight inside": lambda p, x, _: (x * p.w) * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS),
    "root first": lambda p, x, _: torch.rsqrt(EPS + x.square().mean(2, keepdim=True)) * x * p.w,
    "pow": lambda p, x, _: x * (x.pow(2).mean(-1, keepdim=True) + EPS).pow(-0.5) * p.w,
    "reciprocal": lambda p, x, _: x * (1 / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS)) * p.w,
    "division": lambda p, x, _: x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * p.w,
    "sum": lambda p, x, _: x * torch.rsqrt((x * x).sum(-1, keepdim=True) / 16 + EPS) * p.w,
    "aten": lambda p, x, _: torch.rms_norm(x, (16,), p.w, EPS),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_rms_norm_is_one_op(small, spelling):
    program = small.program(SPELLINGS[spelling], w=WEIGHT)
    assert _raise(program, RaiseOps()).modified
    assert small.text(program) == [
        "%0: f32[1, n, 16] = aten.embedding.default(embed, %input_ids)",
        f"%1: f32[1, n, 16] = {ONE}(%0, w, 1e-05)",
        "%2: f32[1, m, 16] = aten.index_select.default(%1, 1, %logit_rows)",
        "return %2",
    ]
    assert not _raise(program, RaiseOps()).modified


def test_one_plus_weight_becomes_an_offset(small):
    program = small.program(
        lambda p, x, _: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * (1.0 + p.w), w=WEIGHT
    )
    _raise(program)
    assert small.text(program)[1] == f"%1: f32[1, n, 16] = {ONE}(%0, w, 1e-05, 1.0)"


def test_heads_without_weight(small):
    def body(p, x, _):
        heads = x.view(1, -1, 4, 4)
        return (heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + EPS)).flatten(2)

    program = small.program(body)
    _raise(program)
    assert any(f"f32[1, n, 4, 4] = {ONE}(" in line and "None, 1e-05)" in line for line in small.text(program))


def test_a_value_that_others_read_keeps_its_own_node(small):
    def body(p, x, _):
        normalized = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        return normalized * p.w + normalized

    program = small.program(body, w=WEIGHT)
    _raise(program)
    assert small.ops(program) == ["rms_norm", "mul", "add"]


def test_casts_around_the_norm_go_with_it(small):
    def body(p, x, _):
        h = x.half()
        f = h.float()
        return (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)).half().float()

    program = small.program(body)
    PassManager([RaiseNorms()], validate=False).run(program)
    assert small.ops(program) == ["_to_copy", "rms_norm", "_to_copy"]
    assert "f16[1, n, 16] = gptq_compile.rms_norm.default(%1, None, 1e-05)" in small.text(program)[2]


NEAR_MISSES = {
    "wrong axis": lambda p, x, _: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS) * p.w,
    "two axes": lambda p, x, _: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + EPS) * p.w,
    "no eps": lambda p, x, _: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * p.w,
    "another value": lambda p, x, _: (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * p.w,
    "not a square": lambda p, x, _: x * torch.rsqrt((x * (x + 1)).abs().mean(-1, keepdim=True) + EPS) * p.w,
    "cube": lambda p, x, _: x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + EPS) * p.w,
    "product with eps": lambda p, x, _: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) * EPS) * p.w,
    "sum with the root": lambda p, x, _: x + torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) + p.w,
    "other root": lambda p, x, _: x * (x.pow(2).mean(-1, keepdim=True) + EPS).pow(-0.25) * p.w,
    "sum over another count": lambda p, x, _: x * torch.rsqrt((x * x).sum(-1, keepdim=True) / 15 + EPS) * p.w,
    "unbiased variance": lambda p, x, _: (
        (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, correction=1) + EPS)
    ),
}


@pytest.mark.parametrize("spelling", NEAR_MISSES)
def test_near_misses_stay_as_they_are(small, spelling):
    program = small.program(NEAR_MISSES[spelling], w=WEIGHT)
    before = small.text(program)
    assert not _raise(program).modified
    assert small.text(program) == before


def test_a_weight_for_another_axis_is_not_the_norms_weight(small):
    program = small.program(lambda p, x, _: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * p.w[:1], w=WEIGHT)
    _raise(program)
    assert small.ops(program) == ["rms_norm", "slice", "mul"] or small.ops(program) == ["slice", "rms_norm", "mul"]


def _by_hand(p, x, _):
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return p.w * ((x - mean) * torch.rsqrt(variance + EPS)) + p.b


LAYER_NORMS = {
    "aten": lambda p, x, _: F.layer_norm(x, (16,), p.w, p.b, EPS),
    "by hand": _by_hand,
    "var": lambda p, x, _: (x - x.mean(-1, keepdim=True))
    * torch.rsqrt(x.var(-1, keepdim=True, correction=0) + EPS) * p.w + p.b,
}  # fmt: skip


@pytest.mark.parametrize("spelling", LAYER_NORMS)
def test_every_spelling_of_layer_norm_is_one_op(small, spelling):
    program = small.program(LAYER_NORMS[spelling], w=WEIGHT, b=BIAS)
    assert _raise(program, RaiseOps()).modified
    assert small.ops(program) == ["layer_norm"]
    assert "gptq_compile.layer_norm.default(%0, w, b, 1e-05)" in small.text(program)[1]


def test_layer_norm_over_two_axes_stays(small):
    def body(p, x, _):
        return F.layer_norm(x.view(1, -1, 4, 4), (4, 4), None, None, EPS).flatten(2)

    program = small.program(body)
    assert not _raise(program).modified


def test_a_bias_added_before_the_weight_is_not_the_norms_bias(small):
    def body(p, x, _):
        centered = x - x.mean(-1, keepdim=True)
        return (centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + EPS) + p.b) * p.w

    program = small.program(body, w=WEIGHT, b=BIAS)
    _raise(program)
    assert small.ops(program) == ["layer_norm", "add", "mul"]


def test_a_parameter_that_is_added_is_not_a_weight(small):
    program = small.program(lambda p, x, _: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) + p.w, w=WEIGHT)
    _raise(program)
    assert small.ops(program) == ["rms_norm", "add"]


def test_two_times_weight_is_not_one_plus_weight(small):
    def body(p, x, _):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * (2.0 + p.w)

    program = small.program(body, w=WEIGHT)
    _raise(program)
    assert sorted(small.ops(program)) == ["add", "mul", "rms_norm"]
