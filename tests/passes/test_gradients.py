# SPDX-License-Identifier: Apache-2.0
"""Token weights from gradients, against autograd through the transformers model itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.hessian import Hessian
from gptq_compile.passes.gptq_quantize import GptqQuantize
from gptq_compile.passes.gradients import cuts_between_layers, squared_gradients
from gptq_compile.passes.stage_runner import Runner
from gptq_compile.passes.stages import quantizable
from tests.architectures import tiny_model, traced

CPU = torch.device("cpu")


def from_transformers(model, ids):
    """Weight name -> squared gradients of the output, every token of every sequence."""
    found: dict[str, list[torch.Tensor]] = {}
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):

            def keep(_, __, out, name=name):
                out.register_hook(lambda g: found.setdefault(f"{name}.weight", []).append(g.square().sum(-1).flatten()))

            hooks.append(layer.register_forward_hook(keep))
    model.requires_grad_(True)
    for row in ids:
        logits = model(row[None]).logits[0]
        F.cross_entropy(logits[:-1], row[1:], reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gemma2"])
def test_they_are_those_of_autograd(architecture):
    """Whatever the number of sequences a call takes, and wherever the graph is cut, or not cut at all."""
    model, program = tiny_model(architecture), traced(architecture)
    linears = quantizable(program, False)
    assert cuts_between_layers([n for n in program.graph.nodes if n.op == "call_function"])
    ids = torch.randint(0, 200, (3, 20), generator=torch.Generator().manual_seed(0))
    expected = from_transformers(model, ids)
    for per_call, whole in ((1, False), (2, False), (2, True)):
        with Runner(program, CPU) as runner:
            got = squared_gradients(program, runner, runner.batches(ids, per_call), linears, whole)
        assert set(got) == {n.args[0] for n in linears}
        for source, squares in got.items():
            names = [n.args[1].meta["param"] for n in linears if n.args[0] is source]
            torch.testing.assert_close(squares, sum(expected[n] for n in names), rtol=2e-4, atol=1e-9)


def test_they_leave_the_parameters_alone():
    program = traced("llama")
    with Runner(program, CPU) as runner:
        ids = torch.arange(24).reshape(2, 12)
        squared_gradients(program, runner, runner.batches(ids, 1), quantizable(program, False))
    assert not any(program.params.get(name).requires_grad for name in program.params)


def test_hessians_are_weighted_by_them(monkeypatch):
    """d = 1 + strength * |g|^2 / mean: the mean weight of a sequence's tokens is 1 + strength."""
    program = traced("llama")
    ids = torch.randint(0, 200, (2, 16), generator=torch.Generator().manual_seed(1))
    seen = []
    add = Hessian.add
    monkeypatch.setattr(Hessian, "add", lambda self, x, weights=None: (seen.append(weights), add(self, x, weights)))
    GptqQuantize(QuantizeConfig(group_size=16, token_strength=3.0), ids).run(program)
    assert len(seen) == 16 and all(w is not None and float(w.min()) >= 1 for w in seen)
    means = [float(torch.cat(seen[i : i + 2]).mean()) for i in range(0, 16, 2)]
    assert means == pytest.approx([4.0] * 8, rel=1e-4)
    assert len({round(float(w.max()), 3) for w in seen}) > 8  # and they differ


def test_other_errors_of_the_gradients_are_not_hidden(monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("gptq_compile.passes.gptq_quantize.squared_gradients", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        GptqQuantize(QuantizeConfig(group_size=16), torch.arange(32).reshape(2, 16)).run(traced("llama"))


def test_a_model_without_gradients_is_quantized_with_equal_weights(monkeypatch, caplog):
    program = traced("llama")

    def fail(*_):
        raise RuntimeError("derivative for aten::something is not implemented")

    monkeypatch.setattr("gptq_compile.passes.gptq_quantize.squared_gradients", fail)
    ids = torch.arange(32).reshape(2, 16)
    equal = program.clone()
    GptqQuantize(QuantizeConfig(group_size=16, token_weighting="none"), ids).run(equal)
    step = GptqQuantize(QuantizeConfig(group_size=16), ids)
    step.run(program)
    assert "aten::something" in caplog.text
    assert all("aten::something" in (report.note or "") for report in step.reports)
    codes = [n for n in program.params if n.endswith(".codes")]
    assert codes and all(torch.equal(program.params.get(n), equal.params.get(n)) for n in codes)
