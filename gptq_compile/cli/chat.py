# SPDX-License-Identifier: Apache-2.0
"""``gptq-compile chat``: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from gptq_compile.cli.generation import (
    add_engine_arguments,
    add_generation_arguments,
    load_engine,
    settings,
    speed_line,
)
from gptq_compile.cli.output import note_line
from gptq_compile.cli.parser import Parser
from gptq_compile.runtime.engine import Engine
from gptq_compile.runtime.errors import ContextError, RequestError

_HELP = (
    "Type a message. /reset starts over, /save FILE writes the conversation as JSON, /exit or Ctrl-D leaves, "
    "Ctrl-C stops an answer."
)


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    p = Parser(prog="gptq-compile chat", description=_HELP)
    p.add_argument("artifact", metavar="OUT", help="the folder that gptq-compile wrote")
    p.add_argument("--system", metavar="TEXT", help="system message")
    add_generation_arguments(p)
    add_engine_arguments(p)
    p.add_argument(
        "--tokens-per-second", action=argparse.BooleanOptionalAction, default=sys.stderr.isatty(),
        help="print the speed of every answer on stderr (default: on a terminal)",
    )  # fmt: skip
    arguments = p.parse_args(argv)
    with load_engine(arguments) as engine:
        if engine.manifest.chat is None:
            raise RequestError("This model has no chat template. Use `gptq-compile run` with a plain prompt.")
        if sys.stdin.isatty():
            # Started in the background of a script, a process is told to ignore Ctrl-C, and so would input() be.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (input() then edits lines and remembers them)
        chat = Conversation(engine, settings(engine, arguments), arguments.system)
        note_line(f"{engine.manifest.name} on {engine.device}. {_HELP}")
        while (said := _ask()) is not None:
            command, _, rest = said.strip().partition(" ")
            if command in ("/exit", "/quit"):
                break
            if command == "/reset":
                chat.reset()
            elif command == "/save":
                note_line(chat.save(rest.strip()))
            elif command:
                speed = chat.answer(said)
                if arguments.tokens_per_second and speed:
                    note_line(speed)
    return 0


class Conversation:
    """The messages so far, and how they are answered."""

    def __init__(self, engine: Engine, chosen: dict[str, Any], system: str | None) -> None:
        self._engine, self._chosen = engine, chosen
        self._start = [{"role": "system", "content": system}] if system is not None else []
        self._messages = list(self._start)
        self._saved: set[pathlib.Path] = set()

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self._messages = list(self._start)

    def save(self, name: str) -> str:
        """Writes the conversation as JSON; returns what to tell. Only files that it wrote are replaced."""
        if not name:
            return "Say where to: /save FILE."
        path = pathlib.Path(name).expanduser()
        content = {"model": self._engine.manifest.name, "messages": self._messages}
        try:
            with path.open("w" if path in self._saved else "x", encoding="utf-8") as file:
                json.dump(content, file, ensure_ascii=False, indent=1)
                file.write("\n")
        except FileExistsError:
            return f"{path} exists already; choose another name."
        except OSError as error:
            return f"{path} cannot be written: {error.strerror or error}."
        self._saved.add(path)
        return f"Saved {len(self._messages)} messages in {path}."

    def answer(self, said: str) -> str | None:
        """Streams the answer to a message; Ctrl-C ends it and keeps what was said so far.

        Returns:
            A line on its speed, or None if there is nothing to say.
        """
        messages = [*self._messages, {"role": "user", "content": said}]
        stream = self._engine.generate(self._engine.chat_prompt(messages), **self._chosen, stream=True)
        text = ""
        try:
            with _interrupts() as interrupted:
                for piece in stream:
                    text += piece
                    sys.stdout.write(piece)
                    sys.stdout.flush()
                    if interrupted.is_set():
                        break
        except ContextError as e:
            note_line(f"{e} The conversation starts over.")
            self.reset()
            return None
        finally:
            stream.close()
        print(flush=True)
        # A question that was stopped before its answer began was not asked.
        if text or not interrupted.is_set():
            self._messages = [*messages, {"role": "assistant", "content": text}]
        return speed_line(stream.results[0], self._engine.device)


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, so that a step of the model is never torn apart; the second raises as usual."""
    pressed = threading.Event()

    def press(_signal: int, _frame: FrameType | None) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _ask() -> str | None:
    """The next line; None at the end. Ctrl-C drops the line that was begun, as in a shell."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            print(flush=True)
