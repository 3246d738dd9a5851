# SPDX-License-Identifier: Apache-2.0
"""Tracing models that use transformers' attention interface: the trace computes what the model computes."""

from __future__ import annotations

import pytest
import torch

from gptq_compile.errors import ModelError
from gptq_compile.frontend.hooks import visible_window
from gptq_compile.frontend.trace import trace
from tests.architectures import param_store, tiny_config, tiny_model, traced

ops = torch.ops.gptq_compile


def _nmse(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).double().square().sum() / want.double().square().sum())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "qwen3_moe"])
def test_trace_equals_the_model(name: str) -> None:
    model, program = tiny_model(name), traced(name, raised=False)
    n = 21
    ids = torch.randint(3, 256, (1, n), generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([20, 3, 7])
    got = program.run(ids, torch.arange(n)[None], rows)
    assert got.shape == (1, 3, 256)
    assert _nmse(got, model(input_ids=ids, use_cache=False).logits[:, rows]) < 1e-10
    found = program.graph.find_nodes(op="call_function", target=ops.attention.default)
    assert len(found) == 2
    windows = [node.args[4] if len(node.args) > 4 else 0 for node in found]
    assert windows == ([8, 0] if name in ("gemma2", "gpt_oss") else [0, 0])


def test_experts_stay_one_op_each() -> None:
    program = traced("mixtral", raised=False)
    experts = program.graph.find_nodes(op="call_function", target=ops.expert_linear.default)
    assert len(experts) == 4  # two layers, each with gate_up and down
    assert all("param" in node.args[1].meta for node in experts)


def test_a_missing_tensor_is_named() -> None:
    store = param_store(tiny_model("llama"))
    store.drop("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ModelError, match=r"no tensor for 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        trace(tiny_config("llama"), store)


def test_a_wrong_shape_is_named() -> None:
    store = param_store(tiny_model("llama"))
    store.set("model.norm.weight", torch.ones(65))
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' has shape \[65\] in the checkpoint"):
        trace(tiny_config("llama"), store)


def test_mask_predicates_are_classified() -> None:
    assert visible_window(lambda b, h, q, k: k <= q) == 0
    assert visible_window(lambda b, h, q, k: (k <= q) & (k > q - 4096)) == 4096
    with pytest.raises(ModelError, match="neither causal nor a sliding window"):
        visible_window(lambda b, h, q, k: (k <= q) & (k // 64 == q // 64))
    with pytest.raises(ModelError, match="neither causal nor a sliding window"):
        visible_window(lambda b, h, q, k: k >= 0)


def test_chunked_attention_is_refused_in_words() -> None:
    with pytest.raises(ModelError, match=r"llama4_text model cannot be traced.*masks attention by a rule"):
        trace(tiny_config("llama4_text"), param_store(tiny_model("llama4_text")))
