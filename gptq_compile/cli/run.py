# SPDX-License-Identifier: Apache-2.0
"""``gptq-compile run``: streams a continuation. Imports nothing beyond what the runtime imports."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gptq_compile.cli.generation import (
    add_engine_arguments,
    add_generation_arguments,
    load_engine,
    settings,
    speed_line,
)
from gptq_compile.cli.output import json_line
from gptq_compile.cli.parser import Parser
from gptq_compile.runtime.engine import Engine
from gptq_compile.runtime.errors import RequestError


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    p = Parser(
        prog="gptq-compile run",
        description="Continues a prompt, printing text as it comes. A chat model takes it as a user's message.",
    )
    p.add_argument("artifact", metavar="OUT", help="the folder that gptq-compile wrote")
    p.add_argument("prompt", nargs="?", metavar="PROMPT", help="text; standard input if left out or -")
    chat = p.add_mutually_exclusive_group()
    chat.add_argument(
        "--chat", action="store_true", default=None, help="use the chat template (default if there is one)"
    )
    chat.add_argument("--no-chat", dest="chat", action="store_false", help="continue the prompt as it is")
    p.add_argument("--system", metavar="TEXT", help="system message of the chat")
    add_generation_arguments(p)
    add_engine_arguments(p)
    p.add_argument("--tokens-per-second", action="store_true", help="print tokens and speed on stderr at the end")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of streaming")
    arguments = p.parse_intermixed_args(argv)  # so that options may stand between OUT and PROMPT
    prompt = _prompt(arguments.prompt)
    with load_engine(arguments) as engine:
        text = _rendered(engine, prompt, arguments.chat, arguments.system)
        chosen = settings(engine, arguments)
        if arguments.json:
            result = engine.generate(text, **chosen, return_dict_in_generate=True)
            json_line(
                {
                    "text": result.text,
                    "token_ids": result.token_ids,
                    "finish_reason": result.finish_reason,
                    "prompt_tokens": result.prompt_tokens,
                    "prefill_seconds": result.prefill_seconds,
                    "decode_seconds": result.decode_seconds,
                    "tokens_per_second": result.tokens_per_second,
                }
            )
            return 0
        stream = engine.generate(text, **chosen, stream=True)
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
        if arguments.tokens_per_second:
            print(speed_line(stream.results[0], engine.device), file=sys.stderr)
    return 0


def _prompt(given: str | None) -> str:
    if given is not None and given != "-":
        return given
    if given is None and sys.stdin.isatty():
        raise RequestError("There is no prompt. Give it after the folder, or on standard input.")
    return sys.stdin.read()


def _rendered(engine: Engine, prompt: str, chat: bool | None, system: str | None) -> str:
    """The prompt in the model's chat template where that is wanted."""
    if chat is None:
        chat = engine.manifest.chat is not None
    if not chat:
        if system is not None:
            raise RequestError("A system message needs a chat template; leave out --system or --no-chat.")
        return prompt
    messages = [{"role": "system", "content": system}] if system is not None else []
    return engine.chat_prompt([*messages, {"role": "user", "content": prompt}])
