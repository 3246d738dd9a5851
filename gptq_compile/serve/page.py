# SPDX-License-Identifier: Apache-2.0
"""The chat page: one file without parts from elsewhere, and the policy that keeps it so."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
import re


@functools.cache
def page() -> tuple[str, str]:
    """The page and its Content-Security-Policy: only its own script and style run, and it talks to its server only."""
    text = importlib.resources.files("gptq_compile.serve").joinpath("page.html").read_text("utf-8")
    script, style = (_hash(re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[0]) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
