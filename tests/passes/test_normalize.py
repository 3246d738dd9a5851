# SPDX-License-Identifier: Apache-2.0
"""normalize: before/after of each rule, validated by running the program."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gptq_compile.passes.manager import PassManager
from gptq_compile.passes.normalize import Normalize

SQUARE = torch.linspace(-1, 1, 256).reshape(16, 16)
WIDE = torch.linspace(-1, 1, 16 * 24).reshape(16, 24)


def _normalize(program):
    manager = PassManager([Normalize()])
    manager.run(program)
    again = PassManager([Normalize()])
    again.run(program)
    assert not again.records[0].modified, "normalize is not idempotent"
    return program


def test_what_changes_nothing_goes(small):
    def body(p, x, _):
        y = F.dropout(x.clone().contiguous(), 0.5, training=False).to(torch.float32)
        return y.view(1, -1, 16)[:, :, 0:16].expand(1, -1, 16).detach()

    assert small.text(_normalize(small.program(body))) == [
        "%0: f32[1, n, 16] = aten.embedding.default(embed, %input_ids)",
        "%1: f32[1, m, 16] = aten.index_select.default(%0, 1, %logit_rows)",
        "return %1",
    ]


def test_slices_and_casts_that_do_something_stay(small):
    program = _normalize(small.program(lambda p, x, _: torch.cat([x[..., 0:8], x.half().float()[..., ::2]], -1)))
    assert [o for o in small.ops(program) if o in ("slice", "_to_copy", "to")].count("slice") == 2
    assert sum(o in ("_to_copy", "to") for o in small.ops(program)) == 2


def test_conv1d_becomes_linear_on_a_transposed_parameter(small):
    def body(p, x, _):
        return torch.addmm(p.b, x.view(-1, 16), p.w).view(1, -1, 24)

    program = _normalize(small.program(body, w=WIDE, b=torch.arange(24.0)))
    assert small.ops(program) == ["linear"]
    assert any("f32[1, n, 24] = aten.linear.default(%0, w.T, b)" in line for line in small.text(program))
    assert torch.equal(program.params.get("w.T"), WIDE.t())
    assert "w" not in program.param_nodes


def test_products_with_parameters_become_linear(small):
    program = _normalize(small.program(lambda p, x, _: x @ p.w + x @ p.v.t(), w=WIDE, v=WIDE.t().contiguous()))
    assert small.ops(program) == ["linear", "linear", "add"]


def test_a_product_of_activations_is_no_linear(small):
    program = _normalize(small.program(lambda p, x, _: x @ (x.transpose(1, 2) @ x)))
    assert "linear" not in small.ops(program)


def test_transposes_that_undo_each_other_go(small):
    program = _normalize(small.program(lambda p, x, _: x.transpose(1, 2).transpose(2, 1) + 1))
    assert small.ops(program) == ["add"]


def test_transposes_of_other_axes_stay(small):
    def body(p, x, _):
        return (
            x.view(1, -1, 4, 4)
            .transpose(1, 2)
            .transpose(2, 3)
            .transpose(2, 3)
            .transpose(2, 1)
            .transpose(2, 3)
            .flatten(2)
        )

    assert small.ops(_normalize(small.program(body))).count("transpose") == 1


def test_small_powers_become_products(small):
    assert small.ops(_normalize(small.program(lambda p, x, _: x**2 + x**3))) == ["mul", "mul", "mul", "add"]
    assert "pow" in small.ops(_normalize(small.program(lambda p, x, _: x.abs() ** 0.5 + x.abs() ** 2.5)))


def test_expressions_of_parameters_are_folded_and_evaluated_when_read(small):
    weight = torch.linspace(-1, 1, 16)
    program = _normalize(small.program(lambda p, x, _: x * (1.0 + p.w).exp(), w=weight))
    assert small.ops(program) == ["mul"]
    (name,) = (n for n in program.param_nodes if n.startswith("folded."))
    torch.testing.assert_close(program.params.get(name), (1.0 + weight).exp())


def test_what_grows_is_not_folded(small):
    program = _normalize(
        small.program(lambda p, x, _: x + (p.w[:, None] * p.w).repeat(8, 8)[:16, :1].t(), w=torch.ones(64))
    )
    assert all(program.params.get(n).numel() <= 4096 for n in program.param_nodes)
