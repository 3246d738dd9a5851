# SPDX-License-Identifier: Apache-2.0
"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServeSettings:
    """Limits and identity of a server.

    Attributes:
        model: the name that requests must give.
        api_key: what ``Authorization: Bearer`` must carry for /v1 and /metrics; None asks for nothing.
        hosts: values of the Host header that are answered, without port; None for all. A page somewhere in the web can
            make a browser send requests to a server on the same machine, but not under a name of that machine.
        max_body_bytes: largest body of a request.
        max_prompt_tokens: longest prompt; None for what the context allows.
        max_new_tokens: most tokens a request may ask for; None for what the context allows.
        max_queue: most sequences that run or wait at once; further requests are refused.
        max_choices: most sequences of one request (prompts times ``n``).
        timeout_seconds: after so long a request ends, waiting included.
        body_seconds: after so long a body must have arrived.
    """

    model: str
    api_key: str | None = None
    hosts: tuple[str, ...] | None = LOOPBACK
    max_body_bytes: int = 1 << 20
    max_prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    max_queue: int = 256
    max_choices: int = 16
    timeout_seconds: float = 600.0
    body_seconds: float = 30.0
