# SPDX-License-Identifier: Apache-2.0
"""Writes a GGUF file of llama's 1B shape with random float16 weights: real sizes for speed, nothing to say.

    python benchmarks/random_llama.py SmolLM2-135M-Instruct.gguf llama-1b.gguf

The tokenizer, and with it the vocabulary, is that of the file it is given. Hidden 2,048, 16 layers, intermediate 8,192,
8 of 32 heads for keys and values, the head tied to the embedding.
"""

from __future__ import annotations

import argparse

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from tqdm import tqdm

LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, CONTEXT = 16, 2048, 8192, 32, 8, 4096


def main() -> None:
    """Copies the tokenizer and writes random tensors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", help="a GGUF file of the llama architecture")
    parser.add_argument("out")
    arguments = parser.parse_args()
    reader = GGUFReader(arguments.tokenizer)
    writer = GGUFWriter(arguments.out, "llama")
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    vocabulary = len(reader.fields["tokenizer.ggml.tokens"].data)
    writer.add_name("random llama 1B")
    writer.add_vocab_size(vocabulary)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        for name, shape in (
            ("attn_norm", (HIDDEN,)), ("attn_q", (HIDDEN, HIDDEN)), ("attn_k", (kv, HIDDEN)), ("attn_v", (kv, HIDDEN)),
            ("attn_output", (HIDDEN, HIDDEN)), ("ffn_norm", (HIDDEN,)), ("ffn_gate", (INTERMEDIATE, HIDDEN)),
            ("ffn_up", (INTERMEDIATE, HIDDEN)), ("ffn_down", (HIDDEN, INTERMEDIATE)),
        ):  # fmt: skip
            shapes[f"blk.{layer}.{name}.weight"] = shape
    for name, shape in shapes.items():
        dtype = np.float32 if len(shape) == 1 else np.float16
        count = int(np.prod(shape))
        kind = GGMLQuantizationType.F32 if len(shape) == 1 else GGMLQuantizationType.F16
        writer.add_tensor_info(name, shape, np.dtype(dtype), count * np.dtype(dtype).itemsize, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    for shape in tqdm(shapes.values(), "tensors"):
        if len(shape) == 1:
            writer.write_tensor_data(np.ones(shape, np.float32))
        else:
            values = random.standard_normal(shape, np.float32) * np.float32(0.02)
            writer.write_tensor_data(values.astype(np.float16))
    writer.close()


if __name__ == "__main__":
    main()
