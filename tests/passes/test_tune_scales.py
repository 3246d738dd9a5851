# SPDX-License-Identifier: Apache-2.0
"""Scales and norm weights tuned end to end: the gradient, what may change, and what happens when it does not help."""

from __future__ import annotations

import json
import pathlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gptq_compile.artifact.dequantized import dequantized_weights
from gptq_compile.errors import CalibrationError, ConfigError
from gptq_compile.passes import tune_scales
from gptq_compile.passes.evaluate import evaluate
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.world import World
from gptq_compile.passes.gptq_quantize import GptqQuantize
from gptq_compile.passes.manager import PassManager
from gptq_compile.passes.program import Program
from gptq_compile.passes.tune_scales import TuneScales, differentiable_weight
from tests.architectures import traced

CONFIG = QuantizeConfig(wbits=2, group_size=48, tune_epochs=3)  # rows of 64 and 128: the last group is short


@pytest.fixture(scope="module")
def calibration() -> Tensor:
    return torch.randint(0, 250, (6, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def original() -> Program:
    return traced("llama")


@pytest.fixture(scope="module")
def quantized(original: Program, calibration: Tensor) -> Program:
    return quantize(original, CONFIG, calibration)


def quantize(original: Program, config: QuantizeConfig, calibration: Tensor) -> Program:
    program = original.clone()
    GptqQuantize(config, calibration).run(program)
    return program


def tune(original: Program, quantized: Program, calibration: Tensor, **settings: Any) -> Program:
    program = quantized.clone()
    step = TuneScales(replace(CONFIG, **settings), original, calibration)
    PassManager([step], validate=False).run(program)
    return program


def divergence(original: Program, program: Program, calibration: Tensor) -> float:
    """Mean KL over the tokens, by whole forward passes."""
    total = 0.0
    for ids in calibration:
        p, q = (torch.log_softmax(evaluate(one, ids).double(), -1) for one in (original, program))
        total += float((p.exp() * (p - q)).sum())
    return total / calibration.numel()


def same(a: Program, b: Program) -> bool:
    return set(a.params) == set(b.params) and all(
        torch.equal(a.params.get(n), b.params.get(n)) for n in a.params if n in a.param_nodes
    )


# -- the weight as a function of the scales


@pytest.mark.parametrize("group", [4, 5, 12])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_the_gradient_is_that_of_the_dense_formula(group: int, sym: bool, permuted: bool) -> None:
    generator = torch.Generator().manual_seed(group)
    rows, columns, bits = 3, 12, 3
    groups = -(-columns // group)
    codes = torch.randint(0, 8, (rows, columns), generator=generator, dtype=torch.uint8)
    zeros = None if sym else torch.randint(0, 8, (rows, groups), generator=generator, dtype=torch.uint8)
    order = torch.randperm(columns, generator=generator) if permuted else torch.arange(columns)
    g_idx = (order // group).to(torch.int32)
    scales = torch.rand(rows, groups, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    made = differentiable_weight(scales, codes, zeros, g_idx if permuted else None, group, bits)
    (got,) = torch.autograd.grad((made * upstream).sum(), scales)
    g = g_idx.long()
    dense = scales[:, g] * (codes.double() - (4.0 if zeros is None else zeros.double()[:, g]))
    (want,) = torch.autograd.grad((dense * upstream).sum(), scales)
    assert torch.equal(made, dense)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    function = lambda s: differentiable_weight(s, codes, zeros, g_idx if permuted else None, group, bits)  # noqa: E731
    assert torch.autograd.gradcheck(function, (scales,))  # finite differences


def test_experts_are_rows_of_one_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 4, (2, 3, 10), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 4, (2, 3, 3), generator=generator, dtype=torch.uint8)
    scales = torch.rand(2, 3, 3, generator=generator, requires_grad=True)
    made = differentiable_weight(scales, codes, zeros, None, 4, 2)
    for e in range(2):
        assert torch.equal(made[e], differentiable_weight(scales[e], codes[e], zeros[e], None, 4, 2))
    (grad,) = torch.autograd.grad(made.sum(), scales)
    assert grad[1, 2, 2] == float((codes[1, 2, 8:].float() - zeros[1, 2, 2].float()).sum())


# -- the pass


def test_predictions_come_closer_and_codes_stay(original: Program, quantized: Program, calibration: Tensor) -> None:
    program = tune(original, quantized, calibration)
    said = program.attrs["tuning"]
    assert said["epochs"] == 3 and said["kept_untuned"] is None
    assert said["divergence_before"] == pytest.approx(divergence(original, quantized, calibration), rel=1e-4)
    assert said["divergence_after"] == pytest.approx(divergence(original, program, calibration), rel=1e-4)
    assert said["divergence_after"] < 0.95 * said["divergence_before"]
    changed = {n for n in program.param_nodes if not torch.equal(program.params.get(n), quantized.params.get(n))}
    assert changed == {n for n in program.param_nodes if n.endswith(".scales") or "norm.weight" in n}
    for name in changed:
        value = program.params.get(name)
        assert value.dtype == torch.float32 and value.isfinite().all() and not value.requires_grad
        if name.endswith(".scales"):
            assert (value > 0).all() and torch.equal(value, value.half().float())
    dequantized = dequantized_weights(program)
    assert torch.equal(dequantized["model.norm.weight"](), program.params.get("model.norm.weight"))
    assert "model.norm.weight" not in dequantized_weights(quantized)


def test_the_same_again_and_another_order_with_another_seed(
    original: Program, quantized: Program, calibration: Tensor
) -> None:
    first = tune(original, quantized, calibration)
    assert same(first, tune(original, quantized, calibration))
    assert not same(first, tune(original, quantized, calibration, seed=1))


def test_sequences_that_run_together_give_the_same(
    original: Program, quantized: Program, calibration: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = tune(original, quantized, calibration)
    monkeypatch.setattr(tune_scales, "sequences_per_call", lambda *_: 8)
    four = tune(original, quantized, calibration)
    assert four.attrs["tuning"]["divergence_before"] == pytest.approx(one.attrs["tuning"]["divergence_before"], 1e-5)
    assert four.attrs["tuning"]["divergence_after"] == pytest.approx(one.attrs["tuning"]["divergence_after"], rel=1e-3)


def test_what_does_not_fit_is_read_again(
    original: Program, quantized: Program, calibration: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = tune(original, quantized, calibration, tune_epochs=1)
    monkeypatch.setattr(tune_scales._Student, "_fits", lambda self: False)
    assert same(held, tune(original, quantized, calibration, tune_epochs=1))


def test_permuted_symmetric_groups_are_tuned_too(original: Program, calibration: Tensor) -> None:
    config = replace(CONFIG, group_size=16, static_groups=False, sym=True)
    quantized = quantize(original, config, calibration)
    assert any(n.endswith(".g_idx") for n in quantized.param_nodes)
    assert not any(n.endswith(".zeros") for n in quantized.param_nodes)
    program = tune(original, quantized, calibration)
    after = divergence(original, program, calibration)
    assert after < divergence(original, quantized, calibration) and program.attrs["tuning"]["kept_untuned"] is None


def test_half_precision(original: Program, quantized: Program, calibration: Tensor) -> None:
    program = tune(original, quantized, calibration, compute_dtype="bfloat16")
    assert divergence(original, program, calibration) < divergence(original, quantized, calibration)


def test_it_is_off_unless_asked_for(original: Program, quantized: Program, calibration: Tensor) -> None:
    program = quantized.clone()
    assert not TuneScales(replace(CONFIG, tune_epochs=0), original, calibration).run(program)
    assert same(program, quantized) and "tuning" not in program.attrs


@pytest.mark.parametrize("rate", [10.0, float("inf")])
def test_what_does_not_help_is_not_kept(
    original: Program,
    quantized: Program,
    calibration: Tensor,
    rate: float,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
) -> None:
    monkeypatch.setattr(tune_scales, "_RATE", rate)
    program = tune(original, quantized, calibration)
    assert same(program, quantized) and "tuned_norms" not in program.attrs
    why = program.attrs["tuning"]["kept_untuned"]
    assert why in caplog.text and ("did not help" in why if rate == 10.0 else "not finite" in why)
    json.dumps(program.attrs["tuning"], allow_nan=False)


def test_a_model_without_derivative_stays_as_it_is(
    original: Program, quantized: Program, calibration: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("derivative for aten::something is not implemented")

    monkeypatch.setattr(tune_scales, "checkpoint", fail)
    program = tune(original, quantized, calibration)
    assert same(program, quantized) and "aten::something" in caplog.text
    assert "aten::something" in program.attrs["tuning"]["kept_untuned"]


def test_predictions_that_are_not_finite_are_said(
    original: Program, quantized: Program, calibration: Tensor, caplog: Any
) -> None:
    broken = quantized.clone()
    broken.params.set("model.norm.weight", torch.full((64,), float("nan")))
    assert not TuneScales(CONFIG, original, calibration).run(broken)
    assert "are not finite" in caplog.text and broken.attrs["tuning"]["divergence_before"] is None


def test_other_errors_are_not_hidden(
    original: Program, quantized: Program, calibration: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(tune_scales, "checkpoint", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        TuneScales(CONFIG, original, calibration).run(quantized.clone())


def test_of_several_processes_the_first_decides(
    original: Program, quantized: Program, calibration: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = next(n for n in quantized.param_nodes if n.endswith(".scales"))
    theirs = torch.full_like(quantized.params.get(name), 0.5)
    told: list[str] = []

    class Second(World):
        def agree(self, value: Any) -> Any:
            assert name in value.tuned and not torch.equal(value.tuned[name], theirs)
            return replace(value, tuned={name: theirs})

    monkeypatch.setattr(tune_scales, "current", lambda: Second(1, 2))
    program = quantized.clone()
    assert TuneScales(CONFIG, original, calibration, note=told.append).run(program)
    assert torch.equal(program.params.get(name), theirs) and not told


def test_it_needs_calibration_tokens_and_gptq(original: Program, quantized: Program) -> None:
    with pytest.raises(CalibrationError, match="tuned on calibration tokens"):
        PassManager([TuneScales(CONFIG, original, None)]).run(quantized.clone())
    for bad in (-1, 1.5, True):
        with pytest.raises(ConfigError, match="tune_epochs is"):
            QuantizeConfig(tune_epochs=bad)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="tune_nsamples is"):
            QuantizeConfig(tune_epochs=1, tune_nsamples=bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="must be gptq"):
        QuantizeConfig(method="rtn", tune_epochs=1)
    with pytest.raises(ConfigError, match="nothing is tuned"):
        QuantizeConfig(tune_nsamples=1)


@pytest.mark.parametrize("name", ["opt", "gemma3_text", "qwen3_moe", "gpt_oss"])
def test_architectures(name: str, calibration: Tensor) -> None:
    """Layer norms with biases, norms of ``1 + w``, experts, and transposed experts with biases and sinks."""
    changes = {"tie_word_embeddings": False} if name == "gemma3_text" else {}
    original = traced(name, **changes)
    quantized = quantize(original, replace(CONFIG, group_size=24), calibration)
    program = tune(original, quantized, calibration)
    assert divergence(original, program, calibration) < divergence(original, quantized, calibration)
    norms = [n for n in program.param_nodes if "norm.weight" in n or n in program.attrs.get("shifted", {})]
    assert norms and set(program.attrs["tuned_norms"]) == set(norms)
    changed = {n for n in program.param_nodes if not torch.equal(program.params.get(n), quantized.params.get(n))}
    assert changed == {n for n in program.param_nodes if n.endswith(".scales")} | set(norms)
    if name == "gemma3_text":
        last = program.params.get(next(k for k, v in program.attrs["shifted"].items() if v == ("model.norm.weight", 1)))
        assert torch.equal(dequantized_weights(program)["model.norm.weight"](), last - 1)
        moved = last - original.params.get("model.norm.weight") - 1
        assert 0 < float(moved.abs().max()) < 0.1


def test_from_the_command_line_to_the_artifact(
    tiny_model: pathlib.Path, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    from transformers import AutoModelForCausalLM

    import gptq_compile
    from gptq_compile.cli.main import main

    out, dequantized = tmp_path / "out", tmp_path / "dequantized"
    command = [
        str(tiny_model), "--target", "cpu:x86-64-v3", "--wbits", "3", "--group-size", "32", "--nsamples", "4",
        "--seqlen", "32", "--batch-buckets", "1", "--activations", "float", "--kv-cache", "float32",
        "--tune-epochs", "1", "--dequantized", str(dequantized), "-o", str(out),
    ]  # fmt: skip
    assert main(command) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "tuned on the calibration tokens, 1 epochs" in printed and "tuning: epoch 1 of 1" in printed
    assert "tuned scales divergence" in printed
    assert main(["inspect", str(out)]) == 0
    assert "scales tuned in 1 epochs, divergence " in " ".join(capsys.readouterr().out.split())
    manifest = json.loads((out / "manifest.json").read_text())["quantization"]
    assert manifest["tune_epochs"] == 1 and manifest["tuning"]["kept_untuned"] is None
    assert manifest["tuning"]["divergence_after"] < manifest["tuning"]["divergence_before"]
    model = AutoModelForCausalLM.from_pretrained(dequantized, dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    norms = [(model.get_parameter(n), before.get_parameter(n)) for n, _ in model.named_parameters() if "norm" in n]
    assert norms and not any(torch.equal(a, b) for a, b in norms)
    ids = np.random.default_rng(0).integers(0, 256, 40)
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)[None]).logits[0].double().numpy()
    with gptq_compile.Engine.load(out) as engine:
        got = engine.logits(ids).astype("float64")
    assert np.square(got - wanted).sum() <= 1e-9 * np.square(wanted).sum()
