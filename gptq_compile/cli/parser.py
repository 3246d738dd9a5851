# SPDX-License-Identifier: Apache-2.0
"""``argparse`` with help that is coloured on a terminal and complaints that are one sentence."""

from __future__ import annotations

import argparse
import re
import sys
from typing import IO, Any, NoReturn

from gptq_compile.errors import ConfigError

_OPTION = re.compile(r"(?<![\w-])(--?[a-zA-Z][\w-]*)")
_HEADING = re.compile(r"^(\S[^\n]*:)$", re.MULTILINE)


class Parser(argparse.ArgumentParser):
    """An argument parser whose ``error`` raises, so that one place prints every error and picks the exit code."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", _Formatter)
        settings.setdefault("allow_abbrev", False)  # --seq must not become --sequential when --seqlen was meant
        super().__init__(**settings)

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError with argparse's words as a sentence."""
        raise ConfigError(f"{message[:1].upper()}{message[1:].rstrip('.')}. See `{self.prog} --help`.")

    def print_help(self, file: Any = None) -> None:
        """Prints the help, in colour on a terminal."""
        out: IO[str] = file or sys.stdout
        text = self.format_help()
        if not out.isatty():
            out.write(text)
            return
        from rich.console import Console
        from rich.text import Text

        styled = Text(text)
        styled.highlight_regex(_OPTION.pattern, "cyan")
        for match in _HEADING.finditer(text):
            styled.stylize("bold", *match.span())
        Console(file=out).print(styled, soft_wrap=True)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help with a column wide enough for the longest common flags."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)
