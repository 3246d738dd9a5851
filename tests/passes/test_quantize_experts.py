# SPDX-License-Identifier: Apache-2.0
"""Linears of experts: a Hessian for each from its own tokens, the fallback, and meaning through packing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from gptq_compile.artifact.dequantized import dequantized_weights
from gptq_compile.kernels.target import Target
from gptq_compile.passes.budget import BudgetedQuantize
from gptq_compile.passes.evaluate import evaluate
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.rtn import rtn
from gptq_compile.passes.gptq.solver import solve
from gptq_compile.passes.gptq.store import dump, load
from gptq_compile.passes.gptq_quantize import GptqQuantize
from gptq_compile.passes.interpret import Interpreter
from gptq_compile.passes.manager import PassManager
from gptq_compile.passes.pipeline import lowering_passes
from gptq_compile.passes.program import Program
from gptq_compile.passes.quantize_experts import TOKENS_PER_FEATURE, ExpertHessians, is_expert, solve_experts
from gptq_compile.passes.stages import quantizable
from tests import architectures

ops = torch.ops.gptq_compile
CONFIG = QuantizeConfig(group_size=16, token_weighting="none")
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def traced(request) -> Program:
    """Experts as ``[experts, N, K]``, and transposed with biases."""
    return architectures.traced(request.param)


@pytest.fixture(scope="module")
def calibration() -> torch.Tensor:
    return torch.randint(0, 250, (12, 48), generator=torch.Generator().manual_seed(5))


def ids(count: int) -> torch.Tensor:
    return torch.randint(0, 250, (count,), generator=torch.Generator().manual_seed(6))


def quantized(traced: Program, calibration: torch.Tensor, **settings) -> tuple[Program, GptqQuantize]:
    program = traced.clone()
    step = GptqQuantize(replace(CONFIG, **settings), calibration)
    PassManager([step], validate=False).run(program)
    return program, step


def nmse(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).double().square().sum() / want.double().square().sum())


def test_experts_are_quantized_and_routers_are_not(traced, calibration):
    program, step = quantized(traced, calibration)
    targets = [n.target for n in program.graph.nodes]
    assert targets.count(ops.quant_expert_linear.default) == 4 and ops.expert_linear.default not in targets
    assert len([r for r in step.reports if "experts" in r.name]) == 4
    assert not any("router" in r.name or r.name.endswith("gate.weight") for r in step.reports)
    for report in step.reports:
        assert report.error is not None and report.error <= report.error_rtn * 1.0001


def test_each_expert_is_solved_on_its_own_tokens(traced, calibration):
    """The first layer's first linear: its inputs do not depend on how experts are quantized."""
    program, step = quantized(traced, calibration, method="gptq")
    node = next(n for n in quantizable(traced, False) if is_expert(n))
    new = next(n for n in program.graph.nodes if n.target is ops.quant_expert_linear.default)
    rows: dict[int, list[torch.Tensor]] = {}
    for row in calibration:
        span = torch.arange(row.numel())
        given = {"input_ids": row[None], "position_ids": span[None], "logit_rows": span}
        env = {n: given[n.name] for n in program.inputs}
        found = Interpreter(program).run(env, [new.args[0], new.args[4]])
        x, chosen = found[new.args[0]], found[new.args[4]]
        for token in range(x.shape[0]):
            for slot in range(x.shape[1]):
                rows.setdefault(int(chosen[token, slot]), []).append(x[token, slot])
    weight = traced.params.get(node.args[1].meta["param"])
    weight = weight.transpose(1, 2) if node.args[3:] and node.args[-1] is True else weight
    codes = program.params.get(new.args[1].meta["param"])
    few = []
    for e in range(weight.shape[0]):
        tokens = torch.stack(rows[e]) if e in rows else torch.zeros(0, weight.shape[2])
        if len(tokens) < TOKENS_PER_FEATURE * weight.shape[2]:
            few.append(e)
            want = rtn(weight[e], CONFIG)
        else:
            want = solve(weight[e], (2 / len(tokens)) * tokens.t() @ tokens, CONFIG)
        assert (codes[e] != want.codes).float().mean() < 0.01  # ties only
    (report,) = [r for r in step.reports if r.name == node.args[1].meta["param"]]
    said = report.note or ""
    assert ("saw fewer than" in said) == bool(few)
    assert len(few) < weight.shape[0]
    assert report.shape == (weight.shape[0] * weight.shape[1], weight.shape[2])


@pytest.mark.parametrize("sequential", ["true", "block"])
def test_calibration_that_reaches_few_experts_is_reported(traced, calibration, sequential):
    _, step = quantized(traced, calibration[:1, :20], sequential=sequential, token_weighting="gradient")
    for report in step.reports:
        if "experts" in report.name:
            assert report.method == "rtn" and "were rounded to nearest" in report.note
            assert "experts 0, 1, 2, 3 saw fewer than" in report.note


@pytest.mark.parametrize("settings", [{}, {"static_groups": False}, {"sym": True, "wbits": 3, "group_size": -1},
                                      {"method": "rtn", "wbits": 8}])  # fmt: skip
@pytest.mark.parametrize("target", ["cpu", "cuda:sm_90"])
def test_meaning_is_kept_to_the_packed_weights(traced, calibration, settings, target):
    program, _ = quantized(traced, calibration, **settings)
    dense = traced.clone()
    for name, make in dequantized_weights(program).items():
        assert make().shape == dense.params.shape(name)
        dense.params.set(name, make())
    want = evaluate(dense, ids(21))
    assert nmse(evaluate(program, ids(21)), want) < 1e-9
    PassManager(list(lowering_passes(Target.parse(target), "float32")), validate=False).run(program)
    assert nmse(evaluate(program, ids(21)), want) < 1e-9
    assert nmse(evaluate(program, ids(21), step=True), want) < 1e-9


def test_half_precision(traced, calibration):
    program, _ = quantized(traced, calibration)
    want = evaluate(program, ids(21))
    PassManager(list(lowering_passes(Target.parse("cuda:sm_90"), "float16")), validate=False).run(program)
    assert nmse(evaluate(program, ids(21)), want) < 1e-4


def test_a_finished_solve_is_taken_over(traced, calibration):
    class Store:
        def __init__(self) -> None:
            self.kept: dict = {}

        def finished(self, name):
            return self.kept.get(name)

        def keep(self, solutions):
            self.kept.update(load(dump(solutions)))

    store = Store()
    first = traced.clone()
    GptqQuantize(CONFIG, calibration, store=store).run(first)
    for name in list(store.kept)[len(store.kept) // 2 :]:
        del store.kept[name]
    second = traced.clone()
    GptqQuantize(CONFIG, calibration, store=store).run(second)
    assert torch.equal(evaluate(first, ids(9)), evaluate(second, ids(9)))


def test_a_budget_covers_experts(traced, calibration):
    program = traced.clone()
    step = BudgetedQuantize(replace(CONFIG, avg_bits=4.0), calibration)
    PassManager([step], validate=False).run(program)
    assert 3.7 < program.attrs["budget"]["bits_per_weight"] <= 4.0
    chosen = {e["name"]: e for e in program.attrs["quantization"]}
    for node in program.graph.nodes:
        if node.target is ops.quant_expert_linear.default:
            name = node.args[1].meta["param"].removesuffix(".codes").removesuffix(".T")
            assert (chosen[name]["bits"], chosen[name]["group_size"]) == node.args[6:8]


def test_token_weights_follow_the_tokens_of_an_expert():
    g = torch.Generator().manual_seed(1)
    x, weights = torch.randn(10, 2, 6, generator=g), torch.rand(10, generator=g)
    chosen = torch.randint(0, 3, (10, 2), generator=g)
    hessians = ExpertHessians(3, 6, CPU, "x")
    hessians.add(x, chosen, weights)
    for e in range(3):
        want, count = np.zeros((6, 6)), 0
        for t in range(10):
            for slot in range(2):
                if chosen[t, slot] == e:
                    want += float(weights[t]) * np.outer(x[t, slot], x[t, slot])
                    count += 1
        np.testing.assert_allclose(hessians.parts[e].matrix().numpy(), 2 / count * want, rtol=1e-4, atol=1e-6)


def test_notes_of_experts_say_which():
    g = torch.Generator().manual_seed(1)
    hessians = ExpertHessians(3, 8, CPU, "x")
    x = torch.randn(100, 8, generator=g)
    x[:, 5] = 0
    hessians.add(x, torch.full((100,), 1))
    solution = solve_experts(torch.randn(30, 8, generator=g), hessians, replace(CONFIG, group_size=8), "w")
    assert solution.stats.reason is not None and solution.stats.method == "gptq"
    assert "experts 0, 2 saw fewer than 16 tokens and were rounded to nearest" in solution.stats.reason
    assert "1 dead columns rounded to nearest (expert 1)" in solution.stats.reason
    assert solution.codes.shape == (30, 8)
