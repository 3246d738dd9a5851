# SPDX-License-Identifier: Apache-2.0
"""lower_precision: where half precision begins and ends, and that casts are neither missing nor doubled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gptq_compile.errors import ConfigError, ModelError, PassError
from gptq_compile.passes.evaluate import evaluate
from gptq_compile.passes.lower_precision import LowerPrecision
from gptq_compile.passes.manager import PassManager

SQUARE = torch.linspace(-1, 1, 256).reshape(16, 16)
WEIGHT = torch.linspace(0.5, 1.5, 16)
D = torch.ops.gptq_compile


def _lower(program, half=torch.float16):
    manager = PassManager([LowerPrecision(half)])
    manager.run(program)
    again = PassManager([LowerPrecision(half)])
    again.run(program)
    assert not again.records[0].modified, "lower_precision is not idempotent"
    return manager.records[0]


def _types(program):
    return {n.name: n.meta["val"].dtype for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)}


def test_a_layer(small):
    def body(p, x, _):
        y = D.rms_norm(x, p.norm, 1e-5)
        return F.linear(x + F.linear(D.gated_act(y, y, "silu"), p.w, p.b), p.w)

    program = small.program(body, w=SQUARE, b=WEIGHT, norm=WEIGHT)
    record = _lower(program)
    assert small.text(program) == [
        "%0: f16[1, n, 16] = aten.embedding.default(embed, %input_ids)",
        "%1: f16[1, n, 16] = gptq_compile.rms_norm.default(%0, norm, 1e-05)",
        "%2: f16[1, n, 16] = gptq_compile.gated_act.default(%1, %1, 'silu')",
        "%3: f16[1, n, 16] = aten.linear.default(%2, w, b)",
        "%4: f16[1, n, 16] = aten.add.Tensor(%0, %3)",
        "%5: f16[1, n, 16] = aten.linear.default(%4, w)",
        "%6: f32[1, n, 16] = aten._to_copy.default(%5, dtype=torch.float32)",
        "%7: f32[1, m, 16] = aten.index_select.default(%6, 1, %logit_rows)",
        "return %7",
    ]
    assert {name: program.params.dtype(name) for name in program.param_nodes} == dict.fromkeys(
        ("embed", "w", "b", "norm"), torch.float16
    )
    assert record.nmse is not None and 0 < record.nmse < 1e-5


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_the_reference_runs_in_half(small, half):
    program = small.program(lambda p, x, _: F.linear(F.silu(F.linear(x, p.w)), p.w), w=SQUARE)
    _lower(program, half)
    logits = evaluate(program, torch.arange(9))
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    assert half in _types(program).values()


def test_rotary_tables_stay_float32_and_heads_are_half(small):
    def body(p, x, positions):
        angles = positions[:, :, None].float() * p.freq
        return D.rotary_embedding(x.view(1, -1, 4, 4), angles.cos(), angles.sin(), False).flatten(2)

    program = small.program(body, freq=torch.ones(4))
    _lower(program)
    (rotary,) = program.graph.find_nodes(op="call_function", target=D.rotary_embedding.default)
    assert [a.meta["val"].dtype for a in rotary.args[:3]] == [torch.float16, torch.float32, torch.float32]
    assert program.params.dtype("freq") == torch.float32


def test_softmax_runs_in_float32_between_half_products(small):
    program = small.program(lambda p, x, _: torch.softmax(x @ x.transpose(1, 2), -1) @ x)
    _lower(program)
    types = {str(n.target): n for n in program.graph.nodes}
    softmax = next(n for name, n in types.items() if "softmax" in name)
    assert softmax.args[0].meta["val"].dtype == torch.float32
    products = program.graph.find_nodes(op="call_function", target=torch.ops.aten.matmul.default)
    assert all(a.meta["val"].dtype == torch.float16 for n in products for a in n.args)


def test_one_value_is_cast_once(small):
    program = small.program(lambda p, x, _: F.linear(x.exp() + x.cos() + x.sin(), p.w), w=SQUARE)
    _lower(program)
    (embedding,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)
    assert sum("_to_copy" in str(u.target) for u in embedding.users) == 1
    assert small.ops(program).count("_to_copy") == 3  # up, down before linear, logits up


def test_softcapped_logits_are_float32_from_the_product_on(small):
    program = small.program(lambda p, x, _: 30.0 * torch.tanh(F.linear(x, p.w) / 30.0), w=SQUARE)
    _lower(program)
    (tanh,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)
    assert tanh.meta["val"].dtype == torch.float32
    assert small.ops(program) == ["linear", "_to_copy", "div", "tanh", "mul"]


@pytest.mark.parametrize("constant", [1e-12, -3e38])
def test_constants_that_half_cannot_hold_keep_the_sum_in_float32(small, constant):
    program = small.program(
        lambda p, x, _: F.linear(x * 2.0, p.w) + F.linear(torch.clamp_min(x, constant), p.w), w=SQUARE
    )
    _lower(program)
    (clamp,) = (n for n in program.graph.nodes if "clamp_min" in str(n.target))
    (double,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    assert clamp.meta["val"].dtype == torch.float32
    assert double.meta["val"].dtype == torch.float16


def test_a_parameter_read_in_both_types_is_stored_in_both(small):
    program = small.program(lambda p, x, _: F.linear(F.linear(x, p.w) * (x.exp() * p.v) + p.v, p.w), w=SQUARE, v=WEIGHT)
    _lower(program)
    names = set(program.param_nodes)
    assert "w" in names and program.params.dtype("w") == torch.float16
    assert program.params.dtype("v") == torch.float32


def test_quantization_scales_stay(small):
    codes = torch.randint(0, 16, (16, 16), dtype=torch.uint8)

    def body(p, x, _):
        return D.quant_linear(x, p.codes, p.scales, None, None, p.b, 4, 16)

    program = small.program(body, codes=codes, scales=torch.full((16, 1), 0.125), b=WEIGHT)
    _lower(program)
    dtypes = {name: program.params.dtype(name) for name in ("codes", "scales", "b")}
    assert dtypes == {"codes": torch.uint8, "scales": torch.float32, "b": torch.float16}


def test_a_weight_out_of_range_is_named(small):
    program = small.program(lambda p, x, _: F.linear(x, p.w), w=SQUARE * 1e5)
    with pytest.raises(ModelError, match=r"^Parameter 'w' holds 1e\+05, which torch\.float16 cannot represent"):
        PassManager([LowerPrecision()]).run(program)


def test_other_types_are_refused():
    with pytest.raises(
        ConfigError, match=r"^lower_precision makes float16 or bfloat16 programs, not torch\.float64\.$"
    ):
        LowerPrecision(torch.float64)


def test_ensures_names_a_mixed_product(small):
    program = small.program(lambda p, x, _: F.linear(x, p.w), w=SQUARE)
    step = LowerPrecision()
    step.run(program)
    (linear,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    program.params.set("other", SQUARE)
    linear.args = (linear.args[0], program._placeholder("other"))
    with pytest.raises(PassError, match=r"^op linear\.default .*mixes \['torch\.float16', 'torch\.float32'\]\.$"):
        step.ensures(program)
