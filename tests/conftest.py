# SPDX-License-Identifier: Apache-2.0
"""A tiny model and what it compiles to, made once a session for every test that needs the whole path."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
from dataclasses import dataclass
from typing import Any

import pytest

# Before anything imports torch or TVM: tests run beside each other on small machines.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning barriers cost ten times the work on busy cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")

GROUP_SIZE, CONTEXT, VOCABULARY = 32, 256, 258


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: processes share the suite by files, and one would wait for another at the end."""
    items.sort(key=lambda item: item.path != pathlib.Path(__file__).with_name("test_architectures.py"))


@dataclass(frozen=True)
class Compiled:
    """What one run of the command line made.

    Attributes:
        model: the Hugging Face folder. ``artifact``, ``dequantized``: what came out.
        events: the JSON events of ``--json``. ``trace``: what ``--trace`` wrote.
    """

    model: pathlib.Path
    artifact: pathlib.Path
    dequantized: pathlib.Path
    events: list[dict[str, Any]]
    trace: pathlib.Path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A random llama (hidden 64, two layers, byte-level tokenizer) as a Hugging Face folder; do not change it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model") / "tiny"
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    wrapped.save_pretrained(folder)
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT, bos_token_id=256,
        eos_token_id=257,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # logits far from uniform, so that a wrong token or cache entry shows
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def compiled(tiny_model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The tiny model compiled for the CPU through the command line; do not change what is in it."""
    from gptq_compile.cli.main import main

    folder = tmp_path_factory.mktemp("compiled")
    out, dequantized, trace = folder / "tiny-w4", folder / "dequantized", folder / "trace.json"
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = main(
            [
                str(tiny_model), "--target", "cpu", "--wbits", "4", "--group-size", str(GROUP_SIZE), "--nsamples", "4",
                "--seqlen", "32", "--batch-buckets", "1,2", "--dequantized", str(dequantized), "--json", "-o", str(out),
                "--trace", str(trace),
                "--activations", "float", "--kv-cache", "float32",  # logits are held to the dequantized model
            ]
        )  # fmt: skip
    assert code == 0
    events = [json.loads(line) for line in said.getvalue().splitlines()]
    return Compiled(tiny_model, out, dequantized, events, trace)
