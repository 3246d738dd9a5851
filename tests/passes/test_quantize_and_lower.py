# SPDX-License-Identifier: Apache-2.0
"""From a traced model to packed weights over a paged cache: meaning at every step, on the ops' references."""

from __future__ import annotations

import pytest
import torch

from gptq_compile.errors import CalibrationError, ConfigError
from gptq_compile.kernels.target import Target
from gptq_compile.passes.evaluate import evaluate
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.hessian import Hessian
from gptq_compile.passes.gptq_quantize import GptqQuantize
from gptq_compile.passes.insert_kv_cache import InsertKvCache
from gptq_compile.passes.manager import PassManager
from gptq_compile.passes.pack_weights import PackWeights
from gptq_compile.passes.program import Program
from gptq_compile.passes.stages import quantizable
from tests import architectures

ops = torch.ops.gptq_compile
aten = torch.ops.aten
GROUP = 32


@pytest.fixture(scope="module")
def traced() -> Program:
    return architectures.traced("llama")


@pytest.fixture(scope="module")
def calibration() -> torch.Tensor:
    return torch.randint(0, 250, (6, 48), generator=torch.Generator().manual_seed(5))


def ids(count: int) -> torch.Tensor:
    return torch.randint(0, 250, (count,), generator=torch.Generator().manual_seed(6))


def nmse(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).square().sum() / want.square().sum())


def quantized(traced: Program, calibration: torch.Tensor, **settings) -> tuple[Program, GptqQuantize]:
    program = traced.clone()
    step = GptqQuantize(QuantizeConfig(**{"group_size": GROUP, **settings}), calibration)
    PassManager([step], validate=False).run(program)
    return program, step


def test_every_linear_but_the_head_is_quantized(traced, calibration):
    names = [n.args[1].meta["param"] for n in quantizable(traced, include_head=False)]
    layers = traced.info.config["num_hidden_layers"]
    assert len(names) == 7 * layers and not any("lm_head" in n for n in names)
    assert len(quantizable(traced, include_head=True)) == 7 * layers + 1
    program, step = quantized(traced, calibration)
    assert [n.target for n in program.graph.nodes].count(ops.quant_linear.default) == 7 * layers
    assert {r.name for r in step.reports} == set(names)
    left = [n.args[1].meta["param"] for n in program.graph.nodes if n.target is aten.linear.default]
    assert left == ["lm_head.weight"]
    assert not any(name in program.param_nodes for name in names)  # no full-precision copy is read any more


@pytest.mark.parametrize("sequential", ["true", "block"])
def test_a_later_hessian_sees_quantized_inputs(traced, calibration, sequential):
    """The second block's first solve must use the activations of the quantized first block, in either order."""
    program, _ = quantized(
        traced, calibration, sequential=sequential, token_weighting="none", mse=False, act_order=False
    )
    target = next(n for n in program.graph.nodes if "layers.1.self_attn.q_proj.weight.codes" in str(
        [a.meta.get("param") for a in n.all_input_nodes]))  # fmt: skip
    original = next(n for n in traced.graph.nodes if n.target is aten.linear.default
                    and n.args[1].meta["param"].endswith("layers.1.self_attn.q_proj.weight"))  # fmt: skip
    from gptq_compile.passes.gptq.solver import prepare, solve
    from gptq_compile.passes.interpret import Interpreter

    hessian = Hessian(target.args[0].meta["val"].shape[-1])
    for row in calibration:
        span = torch.arange(row.numel())
        given = {"input_ids": row[None], "position_ids": span[None], "logit_rows": span}
        env = {node: given[node.name] for node in program.inputs}
        hessian.add(Interpreter(program).run(env, [target.args[0]])[target.args[0]])
    config = QuantizeConfig(group_size=GROUP, token_weighting="none", mse=False, act_order=False)
    expected = solve(traced.params.get(original.args[1].meta["param"]), prepare(hessian, config), config)
    codes = program.params.get(target.args[1].meta["param"])
    assert (codes != expected.codes).float().mean() < 0.01  # ties only


def test_gptq_beats_rounding_on_its_objective(traced, calibration):
    _, step = quantized(traced, calibration)
    assert all(r.error <= r.error_rtn * 1.0001 for r in step.reports)
    assert sum(r.error for r in step.reports) < 0.8 * sum(r.error_rtn for r in step.reports)


def test_no_calibration_is_refused(traced):
    with pytest.raises(CalibrationError, match="needs calibration tokens"):
        PassManager([GptqQuantize(QuantizeConfig(group_size=GROUP), None)], validate=False).run(traced.clone())


def test_a_group_larger_than_a_layer_names_it(traced, calibration):
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn.*group_size is 512"):
        quantized(traced, calibration, group_size=512)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_packing_keeps_the_logits(traced, calibration, bits, target):
    program, _ = quantized(traced, calibration, wbits=bits, method="rtn", sym=bits == 3)
    before = evaluate(program, ids(21))
    PassManager([InsertKvCache(), PackWeights(Target.parse(target))], validate=False).run(program)
    assert nmse(evaluate(program, ids(21)), before) < 1e-10
    assert nmse(evaluate(program, ids(21), step=True), before) < 1e-10


def test_act_order_groups_are_gathered_once_for_linears_that_share_an_input(traced, calibration):
    program, _ = quantized(traced, calibration, static_groups=False)
    before = evaluate(program, ids(21))
    PassManager([PackWeights(Target.parse("cpu"))], validate=False).run(program)
    assert nmse(evaluate(program, ids(21)), before) < 1e-10
    gathers = [n for n in program.graph.nodes if n.target is aten.index_select.default and n.args[1] == 2]
    layers = traced.info.config["num_hidden_layers"]
    assert len(gathers) == 4 * layers  # q/k/v together, o, gate/up together, down


def test_only_the_rows_asked_for_reach_the_head(traced):
    program = traced.clone()
    tokens = str(program.input("input_ids").meta["val"].shape[1])
    PassManager([InsertKvCache()], validate=False).run(program)
    head = next(n for n in program.graph.nodes if n.target is aten.linear.default and n is program.output)
    assert str(head.meta["val"].shape[1]) != tokens
    assert PassManager([InsertKvCache()], validate=False).run(program) and len(program.inputs) == 6 + 2 * 2


def test_sequences_in_one_call_do_not_see_each_other(traced):
    """Two sequences interleaved token by token in one call give the logits of each alone."""
    program = traced.clone()
    PassManager([InsertKvCache()], validate=False).run(program)
    a, b = ids(20), ids(13).flip(0)
    alone = [evaluate(program, a), evaluate(program, b)]
    order = [(s, t) for t in range(20) for s in (0, 1) if t < (20, 13)[s]]
    tokens = torch.tensor([[(a, b)[s][t] for s, t in order]])
    positions = torch.tensor([[t for _, t in order]])
    table = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    slots = torch.tensor([int(table[s, t // 16]) * 16 + t % 16 for s, t in order], dtype=torch.int32)
    caches = [torch.zeros((4, *map(int, n.meta["val"].shape[1:]))) for n in program.inputs[6:]]
    sequence = torch.tensor([s for s, _ in order], dtype=torch.int32)
    out = program.run(tokens, positions, torch.arange(len(order)), sequence, slots, table, *caches)[0]
    for which in (0, 1):
        rows = [i for i, (s, _) in enumerate(order) if s == which]
        assert nmse(out[rows], alone[which]) < 1e-10
