# SPDX-License-Identifier: Apache-2.0
"""Writes what the Python engine generates, for check_cpp.sh: one case a line, options, prompt, result."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from gptq_compile.runtime.engine import Engine

PROMPTS = [
    "What is a compiler?",
    "Write a haiku about rain.",
    "Name three prime numbers and explain why they are prime.",
    "Translate to French: Good morning, how are you?",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
    "1, 1, 2, 3, 5, 8,",
    "\u00dcber den D\u00e4chern \U0001f642 \u65e5\u672c",
]
# Option of `generate` -> setting of the Python engine.
SAMPLED: dict[str, dict[str, Any]] = {
    "": {},
    "--repetition-penalty 1.3": {"repetition_penalty": 1.3},
    "--temperature 0.8 --seed 11": {"do_sample": True, "temperature": 0.8, "seed": 11},
    "--temperature 1.2 --top-k 40 --top-p 0.9 --seed 5": {
        "do_sample": True, "temperature": 1.2, "top_k": 40, "top_p": 0.9, "seed": 5,
    },
}  # fmt: skip


def main() -> None:
    """Generates and writes."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("artifact", type=pathlib.Path)
    p.add_argument("output", type=pathlib.Path)
    p.add_argument("--tokens", type=int, default=64, help="new tokens a prompt (default: 64)")
    arguments = p.parse_args()
    lines = []
    with Engine.load(arguments.artifact, max_batch=1, verify=False) as engine:
        assert engine.tokenizer is not None
        prompts = [engine.tokenizer.encode(text) for text in PROMPTS]
        if engine.manifest.chat is not None:
            prompts += [engine.tokenizer.encode(engine.chat_prompt([{"role": "user", "content": t}])) for t in PROMPTS]
        # Beyond one chunk of prefill, where the context allows it.
        text = " ".join(PROMPTS * 12)
        prompts.append(engine.tokenizer.encode(text)[: min(700, engine.context_length - arguments.tokens)])
        for options, settings in SAMPLED.items():
            for ids in prompts if not options else prompts[:3]:
                made = engine.generate(ids, arguments.tokens, **settings, return_dict_in_generate=True).token_ids
                lines.append(f"{options}|{','.join(map(str, ids))}|{' '.join(map(str, made))}")
        for text in PROMPTS:
            # In hexadecimal, with the newline that the example prints at the end.
            lines.append(f"text|{text}|{(str(engine.generate(text, arguments.tokens)) + chr(10)).encode().hex()}")
        settings = {"max_new_tokens": 200, "eos_token_id": [], "return_dict_in_generate": True}
        print(
            f"Python: {engine.generate('A compiler is', **settings).tokens_per_second:.1f} tokens/s on {engine.device}"
        )
    arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
