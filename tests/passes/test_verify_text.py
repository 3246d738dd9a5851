# SPDX-License-Identifier: Apache-2.0
"""verify names the node that breaks a rule; to_text prints types, parameters and origins."""

from __future__ import annotations

import pytest
import torch

from gptq_compile.errors import PassError
from gptq_compile.passes.text import to_text
from gptq_compile.passes.verify import verify


@pytest.fixture(scope="module")
def traced(small_module):
    return small_module.program(
        lambda p, x, _: torch.nn.functional.linear(x, p.w, p.b), w=torch.eye(16), b=torch.ones(16)
    )


@pytest.fixture
def program(traced):
    return traced.clone()


def _linear(program):
    return program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[0]


def test_a_traced_program_is_well_formed(program):
    verify(program)


def test_a_missing_parameter(program):
    program.params.drop("w")
    with pytest.raises(PassError, match=r"^Parameter 'w' is used by the graph but is not in the parameter store\.$"):
        verify(program)


def test_a_parameter_of_another_shape(program):
    program.params.set("w", torch.zeros(16, 8))
    with pytest.raises(
        PassError, match=r"^Parameter 'w' has shape \[16, 8\] in the store but \[16, 16\] in the graph\.$"
    ):
        verify(program)


def test_a_foreign_op(program):
    _linear(program).target = torch.ops.profiler._record_function_enter_new.default
    with pytest.raises(PassError, match=r"is neither an ATen op nor one of ours\.$"):
        verify(program)


def test_a_python_function(program):
    _linear(program).target = to_text
    with pytest.raises(PassError, match=r"is not an op of the IR\.$"):
        verify(program)


def test_a_value_without_a_shape(program):
    del _linear(program).meta["val"]
    with pytest.raises(PassError, match=r"has no fake value, so its shape is unknown\.$"):
        verify(program)


def test_two_results(program):
    out = program.graph.find_nodes(op="output")[0]
    out.args = ((program.output, program.output),)
    with pytest.raises(PassError, match=r"^A program must return exactly one value, its logits\.$"):
        verify(program)


def test_text(program):
    text = to_text(program).splitlines()
    assert {
        "param embed: f32[32, 16]", "param w: f32[16, 16]", "param b: f32[16]",
        "input %input_ids: i64[1, n]", "input %position_ids: i64[1, n]", "input %logit_rows: i64[m]",
    } <= set(text)  # fmt: skip
    assert "%linear: f32[1, n, 16] = aten.linear.default(%embedding, w, b)" in text
    assert text[-1] == "return %index_select"
