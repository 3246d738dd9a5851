# SPDX-License-Identifier: Apache-2.0
"""Chat prompts from the artifact's segments, which the compiler derived from the model's template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gptq_compile.runtime.errors import RequestError


def chat_prompt(
    chat: Mapping[str, Any] | None,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
) -> str:
    """Renders messages as one prompt.

    Args:
        chat: the manifest's chat section.
        messages: ``{"role": ..., "content": text or [{"type": "text", "text": ...}]}``.
        add_generation_prompt: end with the beginning of the assistant's answer.

    Returns:
        The prompt's text, special tokens written out.

    Raises:
        RequestError: if the model has no chat template or a message is malformed.
    """
    if chat is None:
        raise RequestError("This model has no chat template. Give a plain prompt.")
    if not messages:
        raise RequestError("A chat needs at least one message.")
    parts = [chat["bos"]]
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        segment = chat["roles"].get(role) if isinstance(role, str) else None
        if segment is None:
            known = ", ".join(sorted(chat["roles"]))
            raise RequestError(f"Message {i + 1} has the role {role!r}; this model's template knows {known}.")
        if i == 0 and role != "system" and chat.get("default_system"):
            parts.append(chat["default_system"])
        parts += [segment["prefix"], _text(message.get("content"), i), segment["suffix"]]
    if add_generation_prompt:
        parts.append(chat["generation_prompt"])
    return "".join(parts)


def _text(content: Any, index: int) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        texts = [p.get("text") if isinstance(p, Mapping) and p.get("type") == "text" else None for p in content]
        if all(isinstance(t, str) for t in texts):
            return "".join(str(t) for t in texts)
    raise RequestError(f"Message {index + 1} has content that is not text.")
