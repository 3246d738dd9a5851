# SPDX-License-Identifier: Apache-2.0
"""round_head: the output projection and nothing else becomes codes, the nearest ones."""

from __future__ import annotations

import pytest
import torch

from gptq_compile.passes.evaluate import evaluate
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq_quantize import GptqQuantize
from gptq_compile.passes.manager import PassManager
from gptq_compile.passes.round_head import RoundHead
from tests.architectures import traced

QUANT = torch.ops.gptq_compile.quant_linear.default


@pytest.mark.parametrize("after_quantization", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_only_the_head(name: str, after_quantization: bool) -> None:
    program = traced(name, tie_word_embeddings=name != "qwen3_moe")
    if after_quantization:
        config = QuantizeConfig(method="rtn", group_size=16)
        PassManager([GptqQuantize(config)], validate=False).run(program)
    before = {n.args[1].meta["param"] for n in program.graph.nodes if n.target is QUANT}
    readers = [n for n in program.graph.nodes if n.target is torch.ops.aten.embedding.default]
    table = {n.args[0].meta["param"]: program.params.get(n.args[0].meta["param"]) for n in readers}
    entries = [e["name"] for e in program.attrs.get("quantization", ())]
    ids = torch.arange(3, 40)
    wanted = evaluate(program, ids).double()
    step = RoundHead(8)
    PassManager([step], validate=False).run(program)
    coded = [n for n in program.graph.nodes if n.target is QUANT and n.args[1].meta["param"] not in before]
    assert [(n.args[1].meta["param"], n.args[6], n.args[7]) for n in coded] == [("lm_head.weight.codes", 8, 64)]
    assert [r.name for r in step.reports] == ["lm_head.weight"]
    assert [e["name"] for e in program.attrs["quantization"]] == [*entries, "lm_head.weight"]
    assert table and all(torch.equal(program.params.get(n), value) for n, value in table.items())
    got = evaluate(program, ids).double()
    assert 1e-8 < float((got - wanted).square().sum() / wanted.square().sum()) < 1e-4
    assert not RoundHead(8).run(program)


def test_codes_are_the_nearest() -> None:
    program = traced("llama")
    weight = program.params.get("lm_head.weight").double()
    PassManager([RoundHead(4)], validate=False).run(program)
    codes, scales = (program.params.get(f"lm_head.weight.{part}").double() for part in ("codes", "scales"))
    grid = (torch.arange(16) - 8).double()[None, None] * scales[:, :1, None]
    nearest = (weight[:, :, None] - grid).abs().amin(-1)
    assert torch.allclose((weight - (codes - 8) * scales).abs(), nearest, rtol=0, atol=1e-12)
