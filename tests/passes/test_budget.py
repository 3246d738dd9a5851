# SPDX-License-Identifier: Apache-2.0
"""Bits per linear under a budget: what is measured, what is chosen, and that the budget is kept."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from gptq_compile.errors import CalibrationError, ConfigError
from gptq_compile.kernels.target import Target
from gptq_compile.passes.budget import BudgetedQuantize, Footprint, stored_bits
from gptq_compile.passes.evaluate import evaluate
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.rtn import rtn
from gptq_compile.passes.manager import PassManager
from gptq_compile.passes.pack_weights import PackWeights
from gptq_compile.passes.program import Program
from gptq_compile.passes.round_head import RoundHead
from gptq_compile.passes.sensitivity import REFERENCE_BITS, candidates_for, measure
from gptq_compile.passes.stages import quantizable
from gptq_compile.passes.store_half import StoreHalf
from tests import architectures

ops = torch.ops.gptq_compile
CONFIG = QuantizeConfig(group_size=64)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def traced() -> Program:
    program = architectures.traced("llama")
    # Uneven on purpose: the first layer's output projection matters more than others.
    name = "model.layers.0.self_attn.o_proj.weight"
    program.params.set(name, program.params.get(name) * 8)
    return program


@pytest.fixture(scope="module")
def calibration() -> torch.Tensor:
    return torch.randint(0, 250, (8, 48), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def found(traced, calibration):
    return measure(traced, quantizable(traced, True), CONFIG, calibration, CPU)


def quantized(traced: Program, calibration: torch.Tensor, **settings) -> tuple[Program, BudgetedQuantize]:
    program = traced.clone()
    footprint = Footprint(Target.parse("cpu"), 4, lm_head_bits=8)
    step = BudgetedQuantize(replace(CONFIG, **settings), calibration, footprint=footprint)
    PassManager([step], validate=False).run(program)
    return program, step


def linears(program: Program) -> dict[str, tuple[int, int]]:
    """Weight name -> bits, group size of the quantized program."""
    nodes = [n for n in program.graph.nodes if n.target is ops.quant_linear.default]
    return {n.args[1].meta["param"].removesuffix(".codes"): (n.args[6], n.args[7]) for n in nodes}


def average_bits(program: Program) -> float:
    """From the tensors themselves: codes at their bits, 16 bits a scale and 8 a zero point."""
    bits = weights = 0
    for name, (width, _) in linears(program).items():
        codes, scales = (program.params.shape(f"{name}.{part}") for part in ("codes", "scales"))
        bits += math.prod(codes) * width + math.prod(scales) * 24
        weights += math.prod(codes)
    return bits / weights


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.up_proj.weight",
                                  "lm_head.weight"])  # fmt: skip
def test_reference_divergence_is_that_of_the_model_with_one_linear_rounded(traced, calibration, found, name):
    changed = traced.clone()
    weight = traced.params.get(name)
    rounding = QuantizeConfig(method="rtn", wbits=REFERENCE_BITS, group_size=64)
    changed.params.set(name, rtn(weight, rounding).weight)
    apart = []
    for ids in calibration[:2]:
        p, q = (torch.log_softmax(evaluate(program, ids).double(), -1) for program in (traced, changed))
        apart.append((p.exp() * (p - q)).sum(-1))
    (sensitivity,) = [s for s in found.values() if s.name == name]
    assert sensitivity.reference == pytest.approx(float(torch.cat(apart).mean()), rel=1e-3)
    assert sensitivity.reference > 0


def test_every_linear_is_measured_and_more_bits_cost_less(traced, found):
    assert {s.name for s in found.values()} == {n.args[1].meta["param"] for n in quantizable(traced, True)}
    for s in found.values():
        assert list(s.divergence) == candidates_for(CONFIG, s.shape[1])
        for group in {g for _, g in s.divergence}:
            falling = [s.divergence[bits, group] for bits in (2, 3, 4, 8)]
            assert falling == sorted(falling, reverse=True)
    by_name = {s.name: s.reference for s in found.values()}
    assert by_name["model.layers.0.self_attn.o_proj.weight"] > 3 * by_name["model.layers.1.self_attn.o_proj.weight"]


def test_candidates_are_the_configured_group_and_smaller_ones():
    groups = lambda size, columns: {g for _, g in candidates_for(QuantizeConfig(group_size=size), columns)}  # noqa: E731
    assert groups(128, 576) == {128, 64, 32}
    assert groups(-1, 576) == {-1, 128, 64, 32}
    assert groups(128, 100) == {64, 32}
    assert groups(128, 20) == {-1}
    assert groups(16, 576) == {16}


@pytest.mark.parametrize("average", [2.6, 3.5, 5.0])
def test_an_average_is_kept_and_used(traced, calibration, average):
    program, _ = quantized(traced, calibration, avg_bits=average)
    got = average_bits(program)
    assert average - 0.15 < got <= average
    assert program.attrs["budget"]["bits_per_weight"] == pytest.approx(got)
    entries = {e["name"]: (e["bits"], e["group_size"]) for e in program.attrs["quantization"]}
    assert entries == linears(program)
    assert all(e["divergence"] >= 0 for e in program.attrs["quantization"])
    assert len(set(entries.values())) > 1


def test_chosen_bits_are_predicted_to_cost_less_than_the_same_bits_everywhere(traced, calibration, found):
    body = [s for s in found.values() if s.name != "lm_head.weight"]
    uniform = sum(s.divergence[3, 32] for s in body)
    bits = sum(stored_bits(*s.shape, QuantizeConfig(wbits=3, group_size=32)) for s in body)
    program, _ = quantized(traced, calibration, avg_bits=bits / sum(math.prod(s.shape) for s in body))
    budget = program.attrs["budget"]
    assert budget["predicted_divergence_bound"] <= budget["predicted_divergence"] < uniform


def test_a_size_bounds_what_is_written(traced, calibration):
    limit = 120_000
    program, _ = quantized(traced, calibration, max_size=limit)
    PassManager([RoundHead(8), StoreHalf(), PackWeights(Target.parse("cpu"))], validate=False).run(program)
    stores = program.params
    size = sum(
        math.prod(stores.shape(name)) * (stores.dtype(name).itemsize)
        for name in {stores.canonical(name) for name in program.param_nodes}
    )
    assert 0.85 * limit < size <= limit


def test_a_bound_on_perplexity_is_kept_as_measured(traced, calibration):
    program, step = quantized(traced, calibration, max_ppl_increase=0.01)

    def nll(model: Program) -> float:
        losses = [torch.nn.functional.cross_entropy(evaluate(model, ids)[:-1], ids[1:]) for ids in calibration[-1:]]
        return float(torch.stack(losses).mean())

    increase = math.expm1(nll(program) - nll(traced))
    assert increase <= 0.01
    assert program.attrs["budget"]["measured_ppl_increase"] == pytest.approx(increase, abs=1e-5)
    assert average_bits(program) < 8
    assert len(step.reports) == 14


def test_impossible_budgets_are_refused(traced, calibration):
    with pytest.raises(ConfigError, match=r"at 2 bits they take .* \(2\.\d+ bits a weight"):
        quantized(traced, calibration, avg_bits=2.1)
    with pytest.raises(ConfigError, match="The budget leaves"):
        quantized(traced, calibration, max_size=1000)
    with pytest.raises(CalibrationError, match="takes two at least"):
        quantized(traced, calibration[:1], max_ppl_increase=0.05)
