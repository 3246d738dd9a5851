# SPDX-License-Identifier: Apache-2.0
"""Other libraries' exceptions in one line, to be put into a sentence."""

from __future__ import annotations


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an exception's text, or its class where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:limit].rstrip(".") if lines else type(error).__name__
