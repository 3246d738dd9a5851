# SPDX-License-Identifier: Apache-2.0
"""Small helpers for what the commands print."""

from __future__ import annotations

import io
import json
import sys
from typing import Any


def error_line(sentence: str) -> None:
    """Prints ``error: sentence`` on stderr, the word in red on a terminal."""
    word = "\033[1;31merror:\033[0m" if sys.stderr.isatty() else "error:"
    print(f"{word} {sentence}", file=sys.stderr, flush=True)


def note_line(sentence: str) -> None:
    """Prints a sentence that is not an error on stderr."""
    print(sentence, file=sys.stderr, flush=True)


def json_line(value: Any) -> None:
    """Prints one JSON value as one line on stdout, at once."""
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)


def show(renderable: Any) -> None:
    """Prints something of rich's on stdout: in colour on a terminal, else as plain lines of a fixed width."""
    from rich.console import Console

    if sys.stdout.isatty():
        Console(highlight=False).print(renderable)
        return
    # A log has no width, and rich fills every line of a table up with spaces.
    page = Console(highlight=False, width=119, file=io.StringIO())
    page.print(renderable)
    lines = [line.rstrip() for line in page.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    print("\n".join(lines), flush=True)


def size(count: float) -> str:
    """Bytes for people, decimal units: ``1.5 GB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds for people: ``0.8 s``, ``2 min 05 s``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
