# SPDX-License-Identifier: Apache-2.0
"""store_half: which matrices become float16, where they are widened again, and what it costs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gptq_compile.passes.evaluate import evaluate
from gptq_compile.passes.manager import PassManager
from gptq_compile.passes.store_half import StoreHalf
from tests.architectures import traced

SQUARE = torch.linspace(-1, 1, 256).reshape(16, 16)
TINY = SQUARE * 1e-7
"""Subnormal in float16: 1e-7 is two units of its last place."""


def test_what_is_widened(small) -> None:
    def body(p, x, _):
        y = F.linear(x, p.w, p.b) + F.linear(x, p.tiny) + F.linear(x, p.large)
        return F.linear(y * p.both.sum(1), p.both)

    program = small.program(body, w=SQUARE, b=SQUARE[0], tiny=TINY, large=SQUARE * 1e5, both=SQUARE)
    manager = PassManager([StoreHalf()])
    manager.run(program)
    text = small.text(program)
    assert text[:2] == [
        "%0: f16[1, n, 16] = aten.embedding.default(embed, %input_ids)",
        "%1: f32[1, n, 16] = aten._to_copy.default(%0, dtype=torch.float32)",
    ]
    assert "%2: f32[16, 16] = aten._to_copy.default(w, dtype=torch.float32)" in text
    assert "%3: f32[1, n, 16] = aten.linear.default(%1, %2, b)" in text
    dtypes = {name: program.params.dtype(name) for name in program.param_nodes}
    assert {name for name, t in dtypes.items() if t == torch.float16} == {"embed", "w"}
    assert torch.equal(program.params.get("w"), SQUARE.half())
    again = PassManager([StoreHalf()])
    again.run(program)
    assert not again.records[0].modified


@pytest.mark.parametrize("tied", [True, False])
def test_a_model(tied: bool) -> None:
    program = traced("llama", tie_word_embeddings=tied)
    ids = torch.arange(3, 40)
    wanted = evaluate(program, ids).double()
    stored = program.params.copy()
    PassManager([StoreHalf()]).run(program)
    got = evaluate(program, ids).double()
    lost = float((got - wanted).square().sum() / wanted.square().sum())
    assert 1e-10 < lost < 1e-5
    halves = {program.params.canonical(n) for n in program.param_nodes if program.params.dtype(n) == torch.float16}
    assert len([n for n in halves if "embed" in n or "lm_head" in n]) == (1 if tied else 2)
    assert all(stored.dtype(name) == torch.float32 for name in halves)
