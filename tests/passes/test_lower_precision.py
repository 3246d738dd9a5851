# SPDX-License-Identifier: Apache-2.0
"""lower_precision: where half precision begins and ends, and that casts are neither missing nor doubled."""

from __future__ import annotations

import re

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
        return F.linear(x + F.linear(D.gated_act(F.linear(y, p.w), F.linear(y, p.w), "silu"), p.w, p.b), p.w)

    program = small.program(body, w=SQUARE, b=WEIGHT, norm=WEIGHT)
    record = _lower(program)
    assert small.text(program) == [
        "%0: f16[1, n, 16] = aten.embedding.default(embed, %input_ids)",
        "%1: f32[1, n, 16] = aten._to_copy.default(%0, dtype=torch.float32)",
        "%2: f16[1, n, 16] = gptq_compile.rms_norm.default(%1, norm, 1e-05, out_dtype=torch.float16)",
        "%3: f16[1, n, 16] = aten.linear.default(%2, w)",
        "%4: f32[1, n, 16] = aten._to_copy.default(%3, dtype=torch.float32)",
        "%5: f16[1, n, 16] = aten.linear.default(%2, w)",
        "%6: f32[1, n, 16] = aten._to_copy.default(%5, dtype=torch.float32)",
        "%7: f16[1, n, 16] = gptq_compile.gated_act.default(%4, %6, 'silu', out_dtype=torch.float16)",
        "%8: f16[1, n, 16] = aten.linear.default(%7, w, b)",
        "%9: f32[1, n, 16] = aten._to_copy.default(%8, dtype=torch.float32)",
        "%10: f32[1, n, 16] = aten.add.Tensor(%1, %9)",
        "%11: f16[1, n, 16] = aten._to_copy.default(%10, dtype=torch.float16)",
        "%12: f16[1, n, 16] = aten.linear.default(%11, w)",
        "%13: f32[1, n, 16] = aten._to_copy.default(%12, dtype=torch.float32)",
        "%14: f32[1, m, 16] = aten.index_select.default(%13, 1, %logit_rows)",
        "return %14",
    ]
    dtypes = {name: program.params.dtype(name) for name in program.param_nodes}
    assert dtypes == {**dict.fromkeys(("embed", "w", "b"), torch.float16), "norm": torch.float32}
    assert record.nmse is not None and 0 < record.nmse < 1e-5


def _norms(program):
    return [n for n in program.graph.nodes if n.target in (D.rms_norm.default, D.layer_norm.default)]


def test_the_residual_stream_is_never_rounded(small):
    """Four layers deep: every sum with the stream is float32, every norm reads it as it is."""

    def body(p, x, _):
        for _ in range(4):
            y = D.rms_norm(x, p.norm, 1e-5)
            x = x + F.linear(D.gated_act(F.linear(y, p.w), F.linear(y, p.w), "silu"), p.w)
        return F.linear(D.layer_norm(x, p.norm, p.b, 1e-5), p.w)

    program = small.program(body, w=SQUARE, norm=WEIGHT, b=WEIGHT)
    _lower(program)
    sums = program.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    assert [n.meta["val"].dtype for n in sums] == [torch.float32] * 4
    norms = _norms(program)
    assert len(norms) == 5
    assert {n.args[0].meta["val"].dtype for n in norms} == {torch.float32}
    assert {n.meta["val"].dtype for n in norms} == {torch.float16}
    # The only casts: up after the table, after each product (in a layer two into the gate and one into the stream) and
    # to the logits; none between stream and norm.
    casts = program.graph.find_nodes(op="call_function", target=torch.ops.aten._to_copy.default)
    assert [n.meta["val"].dtype for n in casts] == [torch.float32] * 14


def test_a_float32_stream_is_closer_than_a_half_one(small):
    """Updates are small against a stream of standard deviation 50, which half precision stores in steps of 1/32."""

    def body(p, x, _):
        x = x * 50.0
        for _ in range(8):
            x = x + F.linear(D.rms_norm(x, p.norm, 1e-5), p.w)
        return F.linear(D.rms_norm(x, p.norm, 1e-5), p.w)

    ids = torch.arange(32)
    program = small.program(body, w=SQUARE, norm=WEIGHT)
    exact = evaluate(program, ids)
    _lower(program)
    error = (evaluate(program, ids) - exact).abs().mean()

    norm = lambda x: D.rms_norm(x, WEIGHT.half(), 1e-5)  # noqa: E731
    x = program.params.get("embed")[ids] * 50.0
    for _ in range(8):
        x = x + F.linear(norm(x), SQUARE.half())
    assert x.dtype == torch.float16
    rounded = (F.linear(norm(x), SQUARE.half()).float() - exact).abs().mean()
    assert error < 0.75 * rounded, (error, rounded)


def test_norms_take_and_return_what_is_around_them(small):
    """Sums in float32 in (normed heads, through movement), half out to half ops, float32 where readers differ."""

    def body(p, x, _):
        heads = D.rms_norm(F.linear(x, p.w).view(1, -1, 4, 4), p.head, 1e-5)
        y = F.linear(heads.transpose(2, 3).flatten(2), p.w)
        x = x + D.layer_norm(y, p.norm, None, 1e-5)
        x = D.rms_norm(x, p.norm, 1e-5)
        return F.linear(x + F.linear(x, p.w), p.w)

    program = small.program(body, w=SQUARE, norm=WEIGHT, head=torch.ones(4))
    _lower(program)
    types = [(n.args[0].meta["val"].dtype, n.meta["val"].dtype) for n in _norms(program)]
    half, full = torch.float16, torch.float32
    assert types == [(full, half), (full, full), (full, full)]
    assert [n.kwargs for n in _norms(program)] == [{"out_dtype": half}, {}, {}]


def test_the_stream_launches_nothing_in_a_layer():
    """After fusion a decode step has no cast of its own in a layer: norms and sums with the stream do it."""
    from gptq_compile.frontend.trace import trace
    from gptq_compile.kernels.target import Target
    from gptq_compile.kernels.tvm_env import relax, tvm
    from gptq_compile.passes.build import relax_passes
    from gptq_compile.passes.lower_to_relax import lower_to_relax
    from gptq_compile.passes.pipeline import lowering_passes, trace_passes
    from tests.architectures import param_store, tiny_model

    model, target = tiny_model("llama", num_hidden_layers=1), Target.parse("cpu")
    program = trace(model.config, param_store(model), name="tiny", source="tests")
    PassManager([*trace_passes(), *lowering_passes(target, "float16")], validate=False).run(program)
    lowered = lower_to_relax(program, target, (1,), sampling=False)
    passes = relax_passes(target)
    with target.tvm():
        last = [p.info.name for p in passes].index("FuseTIR")
        module = tvm.transform.Sequential(passes[: last + 1])(lowered.module)
    calls = []

    def visit(node):
        if isinstance(node, tvm.ir.Call) and getattr(node.op, "name", "").startswith("relax.call_tir"):
            calls.append(re.sub(r"\d", "", node.args[0].name_hint))

    relax.analysis.post_order_visit(module["decode_1"], visit)
    # 2 norms, 7 products, 2 rotary embeddings, append, attention, gated activation; then norm and lm_head.
    assert len([c for c in calls if "_kernel" in c]) == 14 + 2, calls
    assert calls.count("rms_norm_kernel") == 3
    assert len([c for c in calls if "add" in c]) == 2, calls
    # Token ids to int64, and the stream right after the look-up, which fuses with nothing.
    assert len([c for c in calls if "cast" in c and set(c.split("_")) <= {"fused", "reshape", "cast"}]) <= 2, calls


def test_ops_with_several_results(small):
    """GPT-2 splits one product into queries, keys and values."""

    def body(p, x, _):
        a, b = F.linear(D.layer_norm(x, p.v, p.v, 1e-5), p.w).split(8, -1)
        return F.linear(x + torch.cat([b, a], -1), p.w)

    # Not SQUARE: its rank is 2, so the last product would cancel and amplify the rounding before it.
    mixing = torch.randn(16, 16, generator=torch.Generator().manual_seed(2)) / 4
    program = small.program(body, w=mixing, v=WEIGHT)
    record = _lower(program)
    assert record.nmse is not None and 0 < record.nmse < 1e-6
    (total,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    assert total.meta["val"].dtype == torch.float32


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_the_reference_runs_in_half(small, half):
    program = small.program(lambda p, x, _: F.linear(F.silu(F.linear(x, p.w)), p.w), w=SQUARE)
    _lower(program, half)
    logits = evaluate(program, torch.arange(9))
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    assert half in _types(program).values()


def test_rotary_takes_float32_sums_and_rounds_once(small):
    def body(p, x, positions):
        angles = positions[:, :, None].float() * p.freq
        heads = D.rotary_embedding(F.linear(x, p.w).view(1, -1, 4, 4), angles.cos(), angles.sin(), False)
        return F.linear(heads.flatten(2), p.w)

    program = small.program(body, freq=torch.ones(4), w=SQUARE)
    _lower(program)
    (rotary,) = program.graph.find_nodes(op="call_function", target=D.rotary_embedding.default)
    assert [a.meta["val"].dtype for a in rotary.args[:3]] == [torch.float32] * 3
    assert rotary.meta["val"].dtype == torch.float16
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
    assert [str(u.target) for u in embedding.users] == ["aten._to_copy.default"]
    assert small.ops(program).count("_to_copy") == 3  # up, down before linear, logits up


def test_softcapped_logits_are_float32_from_the_product_on(small):
    program = small.program(lambda p, x, _: 30.0 * torch.tanh(F.linear(x, p.w) / 30.0), w=SQUARE)
    _lower(program)
    (tanh,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)
    assert tanh.meta["val"].dtype == torch.float32
    assert small.ops(program) == ["linear", "_to_copy", "div", "tanh", "mul"]


@pytest.mark.parametrize("constant", [1e-12, -3e38])
def test_constants_that_half_cannot_hold_keep_the_sum_in_float32(small, constant):
    def body(p, x, _):
        x = F.linear(x, p.w)
        return F.linear(x * 2.0, p.w) + F.linear(torch.clamp_min(x, constant), p.w)

    program = small.program(body, w=SQUARE)
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


def test_quantized_products_reach_gates_as_float32_sums(small):
    codes = torch.randint(0, 16, (16, 16), dtype=torch.uint8)

    def body(p, x, _):
        product = lambda: D.quant_linear(x, p.codes, p.scales, None, None, p.b, 4, 16)  # noqa: E731
        return F.linear(D.gated_act(product(), product(), "silu") + product(), p.w)

    program = small.program(body, codes=codes, scales=torch.full((16, 1), 0.125), b=WEIGHT, w=SQUARE)
    _lower(program)
    (gate,) = program.graph.find_nodes(op="call_function", target=D.gated_act.default)
    assert [a.meta["val"].dtype for a in gate.args[:2]] == [torch.float32] * 2
    products = program.graph.find_nodes(op="call_function", target=D.quant_linear.default)
    assert {n.meta["val"].dtype for n in products} == {torch.float16}
    assert all(a.target is torch.ops.aten._to_copy.default and a.args[0] in products for a in gate.args[:2])


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
