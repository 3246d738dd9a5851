# SPDX-License-Identifier: Apache-2.0
"""Tiny models of many architectures, shared by tests: two layers, random weights, logits that are far from flat."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch

from gptq_compile.frontend.trace import trace
from gptq_compile.passes.manager import PassManager
from gptq_compile.passes.pipeline import trace_passes
from gptq_compile.passes.program import ParamStore, Program

_BASE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = {**_BASE, "num_key_value_heads": 2}
_LOCAL_GLOBAL = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_GPT2 = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GQA,
    "mistral": {**_GQA, "sliding_window": 8},
    "qwen2": _GQA,
    "qwen3": {**_GQA, "head_dim": 32},
    "phi": _BASE,
    "phi3": _GQA,
    "gemma2": {**_GQA, "head_dim": 32, **_LOCAL_GLOBAL},
    "gemma3_text": {**_GQA, "head_dim": 32, **_LOCAL_GLOBAL},
    "opt": {
        "vocab_size": 256, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 128, "word_embed_proj_dim": 64,
    },
    "gpt2": {**_GPT2, **_TOKENS},
    "gpt_bigcode": {**_GPT2, **_TOKENS},
    "gptj": {**_GPT2, **_TOKENS, "rotary_dim": 8},
    "codegen": {**_GPT2, **_TOKENS, "rotary_dim": 8},
    "gpt_neox": {**_BASE, "rotary_pct": 0.25},
    "gpt_neo": {
        "vocab_size": 256, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": 8,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 128, **_TOKENS,
    },
    "bloom": {"vocab_size": 256, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": 256, "d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 64},
    "falcon": {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **_TOKENS},
    "xglm": {
        "vocab_size": 256, "d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "biogpt": _BASE,
    "stablelm": _GQA,
    "olmo": _GQA,
    "olmo2": _GQA,
    "cohere": _GQA,
    "granite": _GQA,
    "starcoder2": _GQA,
    "smollm3": _GQA,
    "nemotron": _GQA,
    "persimmon": _BASE,
    "glm4": {**_GQA, "head_dim": 16},
    "ernie4_5": _GQA,
    "exaone4": {**_GQA, "sliding_window": 8},
    "seed_oss": {**_GQA, "head_dim": 16},
    "helium": {**_GQA, "head_dim": 16},
    "arcee": _GQA,
    "hunyuan_v1_dense": {**_GQA, "head_dim": 16},
    "mixtral": {**_GQA, "num_local_experts": 4},
    "qwen3_moe": {**_GQA, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {**_GQA, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        **_GQA, **_LOCAL_GLOBAL, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v3": {
        **_BASE, "n_routed_experts": 4, "moe_intermediate_size": 32, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_group": 2, "topk_group": 1,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    },
    "bert": _BASE,
    "mamba": {"vocab_size": 256, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 1, **_TOKENS},
    "llama4_text": {
        **_GQA, "head_dim": 16, "intermediate_size_mlp": 128, "num_local_experts": 2, "attention_chunk_size": 8,
    },
}  # fmt: skip


def tiny_config(name: str, **changes: Any) -> Any:
    """A two-layer transformers config of model type ``name``; ``changes`` override single keys."""
    from transformers import AutoConfig

    return AutoConfig.for_model(name, **{**CONFIGS[name], **changes})


def tiny_model(name: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A float32 model on the CPU whose weights keep activations of order one, so that every part of it matters."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes), dtype=torch.float32).eval()
    with torch.no_grad():
        for key, param in model.named_parameters():
            if param.dim() < 2:
                param.add_(torch.randn_like(param) * 0.1)
            elif "embed" in key or "wte" in key:
                param.copy_(torch.randn_like(param))
            else:
                param.copy_(torch.randn_like(param) * 2 / param.shape[-1] ** 0.5)
    return model.requires_grad_(False)


def param_store(model: torch.nn.Module) -> ParamStore:
    """The model's tensors under their checkpoint names."""
    store = ParamStore()
    for key, value in model.state_dict().items():
        store.set(key, value)
    return store


@functools.cache
def _made(name: str, raised: bool, changes: tuple[tuple[str, Any], ...]) -> Program:
    if raised:
        program = _made(name, False, changes).clone()
        PassManager(trace_passes(), validate=False).run(program)
        return program
    return trace(tiny_config(name, **dict(changes)), param_store(tiny_model(name, **dict(changes))), name=name)


def traced(name: str, *, raised: bool = True, **changes: Any) -> Program:
    """The program of `tiny_model`; a clone of one that is made once a process, because tracing takes seconds.

    Args:
        name: a key of `CONFIGS`. ``changes``: override single keys.
        raised: as the passes before quantization leave it, not as it was traced.
    """
    made = _made(name, raised, tuple(sorted(changes.items())))
    program = made.clone()
    program.info = copy.deepcopy(made.info)
    return program
