# SPDX-License-Identifier: Apache-2.0
"""Which nodes are lowered as one kernel: tiny models of several kinds, for CUDA and for the CPU."""

from __future__ import annotations

import collections
import functools

import pytest
import torch

from gptq_compile.kernels.target import Target
from gptq_compile.passes import fusion
from gptq_compile.passes.build import relax_passes
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq_quantize import GptqQuantize
from gptq_compile.passes.lower_to_relax import lower_to_relax
from gptq_compile.passes.manager import PassManager
from gptq_compile.passes.pipeline import lowering_passes
from gptq_compile.passes.program import Program
from tests.architectures import traced

HOPPER, ALONE, OLDER, CPU = (Target.parse(t) for t in ("cuda:sm_90", "cuda:sm_90a", "cuda:sm_80", "cpu"))


@functools.cache
def _program(name: str, target: Target) -> Program:
    program = traced(name)
    rtn = GptqQuantize(QuantizeConfig(wbits=4, group_size=32, method="rtn"))
    PassManager([rtn], validate=False).run(program)
    # Validated: linears that became one compute what they did.
    PassManager(list(lowering_passes(target, "float16"))).run(program)
    return program


def _calls(name: str, target: Target, entry: str, batch: int = 1) -> collections.Counter[str]:
    """Kernel -> launches of one call of an entry."""
    from gptq_compile.kernels.tvm_env import relax, tvm

    module = lower_to_relax(_program(name, target), target, [batch], sampling=False).module
    with target.tvm():
        module = tvm.transform.Sequential(relax_passes(target)[:11])(module)
    counts: collections.Counter[str] = collections.Counter()

    def visit(node: object) -> None:
        if isinstance(node, tvm.ir.Call) and isinstance(node.op, tvm.ir.GlobalVar):
            counts[node.op.name_hint.rstrip("0123456789")] += 1

    relax.analysis.post_order_visit(module[entry], visit)
    return counts


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_a_layer_of_a_decode_step_is_five_kernels(name):
    counts = _calls(name, HOPPER, "decode_1")
    assert counts["fused_linear_kernel"] == 2 * 4 and counts["decode_attention_kernel"] == 2
    # The last norm and the head; what is left besides is the embedding, positions and rows.
    assert counts["rms_norm_kernel"] + counts["layer_norm_kernel"] == 1 and counts["linear_kernel"] == 1
    assert counts["quant_linear_kernel"] == counts["gated_act_kernel"] == counts["kv_append_kernel"] == 0
    assert counts.total() <= 10 + 10


def test_prefill_reads_the_factors_of_a_gate_where_they_are():
    counts = _calls("llama", HOPPER, "forward")
    assert counts["gated_act_kernel"] == 2 and counts["quant_linear_kernel"] == 2 * 4
    assert counts["fused_linear_kernel"] == counts["decode_attention_kernel"] == 0


@pytest.mark.parametrize(("entry", "batch"), [("forward", 1), ("decode_32", 32)])
def test_many_rows_are_gated_and_added_where_they_are_multiplied(entry, batch):
    counts = _calls("llama", ALONE, entry, batch)
    # The output of attention and of the MLP are added to the stream; gate and up come out multiplied.
    assert counts["fused_linear_kernel"] == 2 * 3 and counts["quant_linear_kernel"] == 2
    assert counts["gated_act_kernel"] == 0 and counts["rms_norm_kernel"] == 2 * 2 + 1


def test_a_gate_that_something_else_reads_is_stored():
    program = _program("llama", ALONE)
    gated = next(n for n in program.graph.nodes if "gated_act" in n.name)
    product = fusion.stretch(gated.args[0])[0]
    linear = next(n for n in program.graph.nodes if "packed_linear" in n.name and fusion._gates(n) is gated)
    assert product in (linear, *linear.users)
    with program.graph.inserting_after(gated):
        other = program.graph.call_function(torch.ops.aten.relu.default, (gated.args[0],))
    try:
        assert fusion._gates(linear) is None
    finally:
        program.graph.erase_node(other)
    assert fusion._gates(linear) is gated


def test_older_targets_keep_what_they_have_no_kernel_for():
    counts = _calls("llama", OLDER, "decode_1")
    assert counts["decode_attention_kernel"] == 0 and counts["paged_attention_kernel"] == 2
    assert counts["rotary_embedding_kernel"] == 4 and counts["fused_linear_kernel"] == 2 * 4


def test_the_cpu_has_no_groups():
    program = _program("llama", CPU)
    assert fusion.plan(program, CPU, 1, lambda node: 1) == {}
    assert not any("+" in name for name in program.param_nodes)


def test_a_norm_that_something_else_reads_is_computed_once():
    # gemma2 adds a norm of the attention's output: that product has no stream to be added to.
    counts = _calls("gemma2", HOPPER, "decode_1")
    assert counts["rms_norm_kernel"] == 2 * 2 + 1
    assert counts["fused_linear_kernel"] + counts["quant_linear_kernel"] == 2 * 4


def test_heads_and_stretches_are_found_through_slices_and_reshapes():
    program = _program("gpt_neox", HOPPER)
    attention = next(n for n in program.graph.nodes if "paged_attention" in n.name)
    q, k, v = (n.args[0] if "rotary" in n.name else n for n in attention.args[:3])
    found = [fusion.heads(n) for n in (q, k, v)]
    assert len({source for source, *_ in found}) == 1
    assert [rest for _, *rest in found] == [[192, 0, 48], [192, 16, 48], [192, 32, 48]]


def test_what_is_told_is_what_is_lowered():
    lowered = lower_to_relax(_program("llama", OLDER), OLDER, [1], sampling=False)
    for entry in ("forward", "decode_1"):
        told: collections.Counter[str] = collections.Counter()
        for case, calls in lowered.calls.items():
            told[f"{case.partition('(')[0]}_kernel"] += calls[entry]
        made = _calls("llama", OLDER, entry)
        assert +told == {name: count for name, count in made.items() if name in told}
    assert lowered.calls.keys() == lowered.kernels.keys()
    assert lowered.translated["aten.embedding.default"] == {"forward": 1, "decode_1": 1}
    why = {case: refused for case, refused in lowered.apart.items() if case.startswith("decode_attention")}
    assert why
    for refused in why.values():
        assert "clusters" in refused["cuda.decode_attention"]


def _grows(name: str, target: Target) -> tuple[int, int]:
    """Allocations of ``forward`` whose size depends on the tokens of a call, and all that keep what is on the way."""
    from gptq_compile.kernels.tvm_env import relax, tvm

    module = lower_to_relax(_program(name, target), target, [1], sampling=False).module
    passes = relax_passes(target)
    last = [str(p.info.name) for p in passes].index("StaticPlanBlockMemory")
    with target.tvm():
        function = tvm.transform.Sequential(passes[: last + 1])(module)["forward"]
    tokens = function.params[0].ty.shape[0]
    sizes = []

    def visit(node: object) -> None:
        if isinstance(node, tvm.ir.Call) and str(getattr(node.op, "name", "")).endswith(
            ("memory.alloc_storage", "builtin.alloc_tensor")
        ):
            sizes.append(list(node.args[0].values))

    relax.analysis.post_order_visit(function, visit)
    variables = tvm.tirx.analysis.undefined_vars
    return sum(any(v.same_as(tokens) for d in size for v in variables(d)) for size in sizes), len(sizes)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_prompts_of_any_length_use_the_same_temporaries_on_the_cpu(name):
    grows, all_of_them = _grows(name, CPU)
    assert grows == 0 and all_of_them > 3
    if name == "llama":
        assert _grows(name, OLDER)[0] > 3, "what is counted is not what grows"
