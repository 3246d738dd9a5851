# SPDX-License-Identifier: Apache-2.0
"""``gptq-compile chat``: a conversation in the terminal."""

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
from gptq_compile.cli.parser import Parser
from gptq_compile.runtime.engine import Engine
from gptq_compile.runtime.errors import ContextError, RequestError

_HELP = "Type a message. /reset starts over, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    p = Parser(prog="gptq-compile chat", description=_HELP)
    p.add_argument("artifact", metavar="OUT", help="the folder that gptq-compile wrote")
    p.add_argument("--system", metavar="TEXT", help="system message")
    add_generation_arguments(p)
    add_engine_arguments(p)
    p.add_argument("--tokens-per-second", action="store_true", help="print the speed of every answer on stderr")
    arguments = p.parse_args(argv)
    with load_engine(arguments) as engine:
        if engine.manifest.chat is None:
            raise RequestError("This model has no chat template. Use `gptq-compile run` with a plain prompt.")
        chosen = settings(engine, arguments)
        start = [{"role": "system", "content": arguments.system}] if arguments.system is not None else []
        messages = list(start)
        print(f"{engine.manifest.name} on {engine.device}. {_HELP}", file=sys.stderr)
        while (said := _ask()) is not None:
            if said in ("/exit", "/quit"):
                break
            if said == "/reset":
                messages = list(start)
                continue
            if not said.strip():
                continue
            messages.append({"role": "user", "content": said})
            try:
                answer, speed = _answer(engine, messages, chosen)
            except ContextError as e:
                print(f"{e} The conversation starts over.", file=sys.stderr)
                messages = list(start)
                continue
            messages.append({"role": "assistant", "content": answer})
            if arguments.tokens_per_second and speed:
                print(speed, file=sys.stderr)
    return 0


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _answer(engine: Engine, messages: list[dict[str, str]], chosen: dict[str, object]) -> tuple[str, str | None]:
    """Streams one answer; Ctrl-C ends it and keeps what was said so far."""
    stream = engine.generate(engine.chat_prompt(messages), **chosen, stream=True)  # type: ignore[arg-type]
    pieces, speed = [], None
    try:
        for piece in stream:
            pieces.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
        speed = speed_line(stream.results[0], engine.device)
    except KeyboardInterrupt:
        stream.close()
    print()
    return "".join(pieces), speed
