# SPDX-License-Identifier: Apache-2.0
"""Calibrations that go wrong, through the whole pass: usable weights, and a report that says what happened."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from gptq_compile.passes.dialect import dequantize
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq_quantize import GptqQuantize, LinearReport
from gptq_compile.passes.manager import PassManager
from gptq_compile.passes.program import Program
from tests.architectures import traced

ops = torch.ops.gptq_compile
HEALTHY = torch.randint(0, 32, (6, 48), generator=torch.Generator().manual_seed(3))
CHAIN = QuantizeConfig(group_size=8, quantize_lm_head=True)


def run(program: Program, calibration: torch.Tensor, config: QuantizeConfig, close: float = 0.05) -> list[LinearReport]:
    """Quantizes, checks that every weight came out finite and close to the original, and returns the reports."""
    original = program.params.copy()
    step = GptqQuantize(config, calibration)
    PassManager([step], validate=False).run(program)
    quantized = [n for n in program.graph.nodes if n.target is ops.quant_linear.default]
    assert len(quantized) == len(step.reports) > 0
    for node in quantized:
        _, codes, scales, zeros, g_idx, _, bits, group = node.args
        get = lambda n: None if n is None else program.params.get(n.meta["param"])  # noqa: E731
        weight = dequantize(get(codes), get(scales), get(zeros), get(g_idx), bits, group)
        want = original.get(codes.meta["param"].removesuffix(".codes"))
        assert torch.isfinite(weight).all()
        # 4 bits a group leave a few percent; corrections along directions that the data never showed could leave any.
        assert float((weight - want).square().sum() / want.square().sum()) < close
    for report in step.reports:
        assert report.error is None or math.isfinite(report.error)
    return step.reports


@pytest.fixture
def chain(small):
    """Two linears on the embedding, scaled by a vector and shifted by another."""

    def make(scale: torch.Tensor | float = 1.0, shift: torch.Tensor | float = 0.0, embed: torch.Tensor | None = None):
        g = torch.Generator().manual_seed(4)
        params = {"a": torch.randn(24, 16, generator=g), "b": torch.randn(16, 24, generator=g) * 0.1}
        params |= {"scale": torch.zeros(16) + scale, "shift": torch.zeros(16) + shift}
        params |= {} if embed is None else {"embed": embed}
        return small.program(
            lambda p, x, positions: F.linear(torch.tanh(F.linear(x * p.scale + p.shift, p.a)), p.b), **params
        )

    return make


def test_a_healthy_calibration_has_nothing_to_say(chain):
    for report in run(chain(), HEALTHY, CHAIN):
        assert report.method == "gptq" and report.damp == CHAIN.damp
        assert report.note is None or "kept in" in report.note


def test_zero(chain):
    first, _ = run(chain(scale=0.0), HEALTHY, CHAIN)
    assert first.method == "rtn" and first.note == "the Hessian is zero: rounded to nearest"


def test_dead_and_constant_columns(chain):
    scale, shift = torch.ones(16), torch.zeros(16)
    scale[[2, 5, 6]] = 0.0
    shift[[5, 6]] = 2.0
    first, _ = run(chain(scale, shift), HEALTHY, CHAIN)
    assert first.method == "gptq" and first.dead_columns == 1
    assert "2 columns are constant over the calibration" in first.note
    assert "1 dead columns rounded to nearest" in first.note


def test_huge_activations(chain):
    first, second = run(chain(scale=1e25), HEALTHY, CHAIN)
    assert first.method == "gptq" and "summed in float64" in first.note
    assert second.method == "gptq"


def test_huge_and_tiny_columns_together(chain):
    scale = torch.ones(16)
    scale[3], scale[9] = 1e12, 1e-12
    first, _ = run(chain(scale), HEALTHY, CHAIN)
    assert first.error is not None and first.error <= first.error_rtn * 1.0001


def test_near_singular(chain):
    """All columns nearly equal: only damping tells them apart, and less of it than float32 can factor."""
    g = torch.Generator().manual_seed(5)
    embed = torch.randn(32, 1, generator=g) + 1e-4 * torch.randn(32, 16, generator=g)
    config = QuantizeConfig(group_size=8, quantize_lm_head=True, damp=1e-9)
    first, _ = run(chain(embed=embed), HEALTHY, config, close=0.2)
    assert first.damp > config.damp or "float64" in first.note
    assert first.note is not None


def test_one_calibration_sample(chain):
    for calibration in (HEALTHY[:1, :2], HEALTHY[:1, :1]):
        first, second = run(chain(), calibration, CHAIN)
        count = calibration.numel()
        assert f"only {count} calibration tokens for 16 features" in first.note
        assert f"only {count} calibration tokens for 24 features" in second.note


def test_some_tokens_are_nan(chain):
    embed = torch.randn(32, 16, generator=torch.Generator().manual_seed(6))
    embed[7], embed[9, 3] = float("nan"), float("inf")
    count = int(((HEALTHY == 7) | (HEALTHY == 9)).sum())
    first, second = run(chain(embed=embed), HEALTHY, CHAIN)
    assert count and f"{count} of {HEALTHY.numel()} calibration tokens were not finite and left out" in first.note
    assert first.method == "gptq" and "left out" in second.note


def test_all_tokens_are_nan(chain):
    for report in run(chain(scale=float("nan")), HEALTHY, CHAIN):
        assert report.method == "rtn" and report.error is None
        assert report.note == "288 of 288 calibration tokens were not finite and left out: rounded to nearest"


@pytest.fixture(scope="module")
def llama() -> Program:
    return traced("llama")


@pytest.mark.parametrize("sequential", ["true", "block"])
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("zero", "the Hessian is zero: rounded to nearest"),
        ("one token", "only 1 calibration tokens for"),
        ("one word", "columns are constant over the calibration"),
        ("nan", "calibration tokens were not finite and left out"),
        ("huge", "summed in float64"),
    ],
)
def test_a_whole_model(llama, case, words, sequential):
    """The same through attention and its token weights."""
    program = llama.clone()
    store = program.params
    calibration = torch.randint(8, 250, (6, 48), generator=torch.Generator().manual_seed(5))
    embed, norm = "model.embed_tokens.weight", "model.layers.0.post_attention_layernorm.weight"
    if case == "zero":
        store.set(embed, torch.zeros_like(store.get(embed)))
    elif case == "one token":
        calibration = calibration[:1, :1]
    elif case == "one word":
        calibration = torch.full_like(calibration, 9)
    elif case == "nan":
        bad = store.get(embed).clone()
        bad[7] = float("nan")
        store.set(embed, bad)
        calibration[2:4, 20] = 7
    else:
        store.set(norm, store.get(norm) * 1e17)
    reports = run(program, calibration, QuantizeConfig(group_size=32, sequential=sequential))
    noted = [r for r in reports if r.note and words in r.note]
    assert len(noted) >= (2 if case == "huge" else len(reports) // 2)
