# SPDX-License-Identifier: Apache-2.0
"""Tiny models saved as Hugging Face folders, and the toy artifact of the runtime's tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_SIZES = {
    "llama": _LLAMA,
    "mixtral": {**_LLAMA, "num_local_experts": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 1},
}


def _save_tokenizer(folder: Path, chat_template: str | None = None) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def save_tokenizer() -> Callable[..., None]:
    """``save_tokenizer(folder, chat_template=None)``: a byte-level tokenizer of 258 tokens."""
    return _save_tokenizer


@pytest.fixture(scope="session")
def save_model() -> Callable[..., object]:
    """Saves random weights with a tokenizer and returns the model.

    ``save_model(folder, model_type="llama", shard="5GB", seed=0, dtype="float32", **config)``
    """

    def save(
        folder: Path,
        model_type: str = "llama",
        *,
        shard: str = "5GB",
        seed: int = 0,
        dtype: str = "float32",
        **config: object,
    ) -> object:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(seed)
        made = AutoConfig.for_model(model_type, **{"vocab_size": 258, **_SIZES[model_type], **config})
        model = AutoModelForCausalLM.from_config(made, dtype=getattr(torch, dtype)).eval()
        model.save_pretrained(folder, max_shard_size=shard)
        _save_tokenizer(folder)
        return model

    return save


@pytest.fixture(scope="session")
def toy_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of ``tests/runtime/toy_model.py`` with a context of 512; do not change it."""
    name = "gptq_compile_toy_model"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "runtime" / "toy_model.py")
    assert spec is not None and spec.loader is not None
    toy = importlib.util.module_from_spec(spec)
    sys.modules[name] = toy
    spec.loader.exec_module(toy)
    folder: Path = toy.write_artifact(tmp_path_factory.mktemp("toy") / "artifact")
    manifest = toy.manifest()
    manifest["model"]["context_length"] = 512
    toy.write_manifest(folder, manifest)
    return folder
