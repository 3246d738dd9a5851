# SPDX-License-Identifier: Apache-2.0
"""``gptq-compile chat`` in a terminal of its own: streaming, history, commands, Ctrl-C."""

from __future__ import annotations

import json
import os
import pathlib
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import pytest

from gptq_compile.runtime.engine import Engine

ROOT = pathlib.Path(__file__).resolve().parents[3]
# Every step is slowed down, so that there is time to press a key in the middle of an answer.
LAUNCH = """
import sys, time
from gptq_compile.cli.main import main
from gptq_compile.runtime.scheduler import Scheduler
step = Scheduler.step
Scheduler.step = lambda self: (time.sleep(0.01), step(self))[1]
sys.exit(main(sys.argv[1:]))
"""


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self._leader, follower = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *arguments], stdin=follower, stdout=follower, stderr=follower,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb", "TVM_NUM_THREADS": "1"},
            start_new_session=True, preexec_fn=_take_terminal, close_fds=True,
        )  # fmt: skip
        os.close(follower)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._leader, text.encode())

    def until(self, pattern: str, seconds: float = 120) -> re.Match[str]:
        """Reads until the pattern appears behind what was read before; what comes after it is left for next time."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self._leader], [], [], max(0, end - time.monotonic()))
            assert ready, f"{pattern!r} did not appear in {self.seen!r}"
            try:
                part = os.read(self._leader, 1 << 16)
            except OSError:  # the program has ended
                part = b""
            assert part, f"the program ended before {pattern!r}: {self.seen!r}"
            self.seen += part.decode("utf-8", "replace").replace("\r\n", "\n")
        self.seen = self.seen[match.end() :]
        return match

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._leader)


def _take_terminal() -> None:
    import fcntl

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches the program as a signal


@pytest.fixture
def terminal(toy_artifact: pathlib.Path) -> Iterator[Terminal]:
    made = Terminal("chat", str(toy_artifact), "--temperature", "0", "--max-new-tokens", "60", "--ignore-eos")
    yield made
    made.close()


def test_a_conversation(terminal: Terminal, toy_artifact: pathlib.Path, tmp_path: pathlib.Path) -> None:
    file, other = tmp_path / "chat.json", tmp_path / "other.json"
    other.write_text("mine")
    terminal.until(r"toy on cpu.*Ctrl-C stops an answer\.\n> ")
    terminal.type("hello\n")
    said = terminal.until(r"\[(\d+) prompt tokens .* 60 tokens at ([\d.]+) tokens/s.*ended by length\]\n> ")
    assert 0 < float(said[2]) < 100  # ten milliseconds a token
    first = int(said[1])
    terminal.type("again\n")
    second = int(terminal.until(r"\[(\d+) prompt tokens.*length\]\n> ")[1])
    assert second > first + 60  # the history went along
    terminal.type(f"/save {file}\n")
    terminal.until(r"Saved 4 messages in .*chat\.json\.\n> ")
    terminal.type(f"/save {other}\n")
    terminal.until(r"exists already; choose another name\.\n> ")
    terminal.type("/save\n")
    terminal.until(r"Say where to: /save FILE\.\n> ")
    assert other.read_text() == "mine"
    saved = json.loads(file.read_text())
    assert saved["model"] == "toy" and [m["role"] for m in saved["messages"]] == ["user", "assistant"] * 2
    with Engine.load(toy_artifact) as engine:
        for count in (1, 3):
            prompt = engine.chat_prompt(saved["messages"][:count])
            assert saved["messages"][count]["content"] == engine.generate(prompt, 60, eos_token_id=[])
    terminal.type("/reset\nhello\n")
    assert int(terminal.until(r"\[(\d+) prompt tokens.*length\]\n> ")[1]) == first
    terminal.type(f"/save {file}\n")  # its own file may be written again
    terminal.until(r"Saved 2 messages.*\n> ")
    terminal.type("/exit\n")
    assert terminal.process.wait(20) == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "chat.json"
    terminal.until("> ")
    terminal.type("a long story\n")
    terminal.until(r"a long story\n\s*\S\S\S")
    terminal.type("\x03")
    stopped = terminal.until(r"(\d+) tokens at .* ended by cancelled\]\n> ")
    assert 3 <= int(stopped[1]) < 60
    terminal.type("a line that is begun")
    terminal.until("begun")
    time.sleep(0.5)  # readline notices a signal while it waits for a key, not while it shows the last one
    terminal.type("\x03")  # it is dropped, and nothing else happens
    terminal.until(r"\n> ")
    terminal.type("go on\n")
    terminal.until(r" 60 tokens at .* ended by length\]\n> ")
    terminal.type(f"/save {file}\n")
    terminal.until(r"Saved 4 messages.*\n> ")
    messages = json.loads(file.read_text())["messages"]
    assert messages[2]["content"] == "go on" and 0 < len(messages[1]["content"]) < len(messages[3]["content"])
    terminal.type("\x04")
    assert terminal.process.wait(20) == 0
