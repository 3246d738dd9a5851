# SPDX-License-Identifier: Apache-2.0
"""fuse_linears: which linears become one, what reads them then, and what is left alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gptq_compile.passes.fuse_linears import FuseLinears, joined_name
from gptq_compile.passes.lower_precision import LowerPrecision
from gptq_compile.passes.manager import PassManager

D = torch.ops.gptq_compile
A, B = torch.linspace(-1, 1, 256).reshape(16, 16), torch.linspace(1, -2, 512).reshape(32, 16)
HALF = torch.linspace(0, 1, 16)


def _fuse(program):
    manager = PassManager([FuseLinears()])
    manager.run(program)
    again = PassManager([FuseLinears()])
    again.run(program)
    assert not again.records[0].modified, "fuse_linears is not idempotent"
    return manager.records[0]


def test_linears_that_read_one_value_become_one(small):
    program = small.program(
        lambda p, x, _: F.linear(x, p.a_q_w) * F.linear(x, p.a_k_w) + F.linear(x.relu(), p.c),
        a_q_w=A, a_k_w=A + 1, c=A,
    )  # fmt: skip
    record = _fuse(program)
    assert record.modified and record.nmse is not None
    assert small.text(program) == [
        "%0: f32[1, n, 16] = aten.embedding.default(embed, %input_ids)",
        "%1: f32[1, n, 32] = aten.linear.default(%0, a_q_w+a_k_w)",
        "%2: f32[1, n, 16] = aten.slice.Tensor(%1, 2, 0, 16)",
        "%3: f32[1, n, 16] = aten.slice.Tensor(%1, 2, 16, 32)",
        "%4: f32[1, n, 16] = aten.mul.Tensor(%2, %3)",
        "%5: f32[1, n, 16] = aten.relu.default(%0)",
        "%6: f32[1, n, 16] = aten.linear.default(%5, c)",
        "%7: f32[1, n, 16] = aten.add.Tensor(%4, %6)",
        "%8: f32[1, m, 16] = aten.index_select.default(%7, 1, %logit_rows)",
        "return %8",
    ]
    assert torch.equal(program.params.get("a_q_w+a_k_w"), torch.cat([A, A + 1]))
    assert set(program.param_nodes) == {"embed", "a_q_w+a_k_w", "c"}


def test_biases_are_put_together_and_their_absence_is_respected(small):
    program = small.program(
        lambda p, x, _: F.linear(x, p.a, p.ab) + F.linear(x, p.b, p.bb)[..., :16] + F.linear(x, p.c),
        a=A, ab=HALF, b=B, bb=torch.ones(32), c=A + 2,
    )  # fmt: skip
    _fuse(program)
    assert torch.equal(program.params.get("ab+bb"), torch.cat([HALF, torch.ones(32)]))
    assert small.ops(program).count("linear") == 2


def test_a_matrix_that_something_else_reads_stays(small):
    program = small.program(lambda p, x, _: F.linear(x, p.a) + F.linear(x, p.c) + p.c.sum(), a=A, c=A + 1)
    assert not _fuse(program).modified


def test_quantized_linears_of_one_grid_become_one(small):
    g = torch.Generator().manual_seed(0)

    def grid(rows, bits, name):
        codes = torch.randint(0, 1 << bits, (rows, 16), generator=g, dtype=torch.uint8)
        scales = (torch.rand(rows, 2, generator=g) / 8).half().float()
        zeros = torch.randint(0, 1 << bits, (rows, 2), generator=g, dtype=torch.uint8)
        return {f"{name}_codes": codes, f"{name}_scales": scales, f"{name}_zeros": zeros}

    def body(p, x, _):
        def product(name, bits):
            tensors = (getattr(p, f"{name}_{key}") for key in ("codes", "scales", "zeros"))
            return D.quant_linear(x, *tensors, None, None, bits, 8)

        return product("q", 4) + product("k", 4)[..., :16] + product("v", 3)

    program = small.program(body, **grid(16, 4, "q"), **grid(24, 4, "k"), **grid(16, 3, "v"))
    before = program.params.get("k_codes")
    assert _fuse(program).nmse < 1e-12
    assert small.ops(program).count("quant_linear") == 2  # three bits lie apart
    assert torch.equal(program.params.get("q_codes+k_codes")[16:], before)
    assert program.params.shape("q_zeros+k_zeros") == (40, 2)


def test_in_half_precision_sums_are_widened_once(small):
    program = small.program(lambda p, x, _: D.gated_act(F.linear(x, p.a), F.linear(x, p.b)[..., :16], "silu"), a=A, b=B)
    PassManager([LowerPrecision()]).run(program)
    _fuse(program)
    text = "\n".join(small.text(program))
    assert "aten._to_copy.default(%1, dtype=torch.float32)" in text  # the product as a whole
    assert small.ops(program).count("linear") == 1


def test_names_join_where_they_differ():
    assert joined_name(["l.0.q_proj.weight.codes", "l.0.k_proj.weight.codes"]) == "l.0.q_proj+k_proj.weight.codes"
    assert joined_name(["a.b", "c"]) == "a.b+c"
