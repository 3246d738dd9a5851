# SPDX-License-Identifier: Apache-2.0
"""An application on a compiled model: asks it several questions about a text at once and prints the answers.

    python ask.py OUT notes.txt "What was decided?" "Who does what until when?"

It needs `pip install gptq-compile` and nothing else: no torch, no transformers, no compiler.
"""

from __future__ import annotations

import pathlib
import sys

from gptq_compile import Engine


def main() -> None:
    """Loads the model, asks, prints."""
    if len(sys.argv) < 4:
        sys.exit(f"usage: {sys.argv[0]} OUT TEXT_FILE QUESTION [QUESTION ...]")
    folder, file, *questions = sys.argv[1:]
    text = pathlib.Path(file).read_text("utf-8")
    with Engine.load(folder, max_batch=len(questions)) as engine:
        prompts = [engine.chat_prompt([{"role": "user", "content": f"{text}\n\n{question}"}]) for question in questions]
        # The prompts run as one batch; what they have in common is computed once.
        stream = engine.generate(prompts, max_new_tokens=200, repetition_penalty=1.1, stream=True)
        for index, _ in stream:
            print(f"\ranswer {index + 1} grows ...", end="", file=sys.stderr)
        for question, result in zip(questions, stream.results, strict=True):
            print(f"\n{question}\n{result.text}")
            print(f"[{len(result.token_ids)} tokens, {result.tokens_per_second:.0f} tokens/s]", file=sys.stderr)


if __name__ == "__main__":
    main()
