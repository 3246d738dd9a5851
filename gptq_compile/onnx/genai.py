# SPDX-License-Identifier: Apache-2.0
"""``genai_config.json``: what onnxruntime-genai's generate loop has to know about an exported model."""

from __future__ import annotations

import json
from typing import Any

from gptq_compile.frontend.source import ModelSource
from gptq_compile.onnx.lowering import Lowering

_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty", "min_length", "num_beams")


def genai_config(source: ModelSource, lowering: Lowering, model_file: str, library: str | None = None) -> bytes | None:
    """The file's content, or None if the model is one that the loop cannot drive; ``library`` has operators for it.

    The loop has one number of key/value heads and one head size for all layers. The model's type is the loop's general
    ``decoder``: what is special about a type is in the graph.
    """
    if len({(kv, dim, v_dim) for kv, dim, v_dim in lowering.layers}) != 1:
        return None
    kv_heads, head_size, v_head_size = lowering.layers[0]
    if head_size != v_head_size or not source.eos_token_ids:
        return None
    inputs = {i.name: i.name for i in lowering.b.inputs if not i.name.startswith("past_key_values.")}
    inputs |= {f"past_{kind}_names": f"past_key_values.%d.{kind}" for kind in ("key", "value")}
    outputs = {"logits": "logits"} | {f"present_{kind}_names": f"present.%d.{kind}" for kind in ("key", "value")}
    text = source.config.get_text_config()
    eos = source.eos_token_ids
    pad = getattr(text, "pad_token_id", None)
    session: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if library is not None:
        session["custom_ops_library"] = library
    model: dict[str, Any] = {
        "bos_token_id": source.bos_token_id,
        "context_length": source.context_length,
        "decoder": {
            "session_options": session,
            "filename": model_file,
            "head_size": head_size,
            "hidden_size": text.hidden_size,
            "inputs": inputs,
            "outputs": outputs,
            "num_attention_heads": lowering.heads[0],
            "num_hidden_layers": len(lowering.layers),
            "num_key_value_heads": kv_heads,
        },
        "eos_token_id": eos if len(eos) > 1 else eos[0],
        "pad_token_id": pad if isinstance(pad, int) and 0 <= pad < source.vocab_size else eos[0],
        "type": "decoder",
        "vocab_size": lowering.program.info.vocab_size,
    }
    if source.bos_token_id is None:
        del model["bos_token_id"]
    given = source.generation
    search = {
        "do_sample": bool(given.get("do_sample", False)),
        "max_length": source.context_length,
        "past_present_share_buffer": lowering.shared_buffer,
        **{key: given[key] for key in _SAMPLING if given.get(key) is not None},
    }
    return json.dumps({"model": model, "search": search}, indent=2).encode()
