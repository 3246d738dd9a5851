# SPDX-License-Identifier: Apache-2.0
"""Decomposes a Jinja chat template into per-role prefixes and suffixes, so that the runtime needs no Jinja.

Rendered conversations are taken to be ``bos + sum(prefix[role] + content + suffix[role]) + generation_prompt``. The
pieces are found by rendering marker messages and are then verified: every conversation of a list must come out of the
pieces exactly as out of the template. A template that does more (tools, a system text inside the user's turn, stripping
of earlier turns) fails that test and is left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

log = logging.getLogger(__name__)

Messages = Sequence[tuple[str, str]]
Render = Callable[[Messages, bool], str]

_S, _U, _A = "Zq0sys0qZ", "Zq1usr1qZ", "Zq2ast2qZ"
_U2, _A2, _U3 = "Zq3usr3qZ", "Zq4ast4qZ", "Zq5usr5qZ"


def render(chat: dict[str, Any], messages: Messages, generation_prompt: bool = True) -> str:
    """Renders ``(role, content)`` pairs with decomposed pieces; the reference of what the runtime does.

    Raises:
        KeyError: for a role the template does not have.
    """
    text = chat["bos"]
    if chat["default_system"] and messages[0][0] != "system":
        text += chat["default_system"]
    for role, content in messages:
        text += chat["roles"][role]["prefix"] + content + chat["roles"][role]["suffix"]
    return text + (chat["generation_prompt"] if generation_prompt else "")


def decompose(tokenizer: Any) -> dict[str, Any] | None:
    """The pieces of a tokenizer's chat template.

    Args:
        tokenizer: a transformers tokenizer.

    Returns:
        ``{"bos", "roles": {role: {"prefix", "suffix"}}, "generation_prompt", "default_system"}``; ``default_system`` is
        the whole text, markers included, that the template puts before a conversation without a system message, or
        None. None if the tokenizer has no template or it does more than the pieces can say.
    """
    if not getattr(tokenizer, "chat_template", None):
        log.info("The tokenizer has no chat template.")
        return None

    def rendered(messages: Messages, generation_prompt: bool) -> str:
        chat = [{"role": role, "content": content} for role, content in messages]
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation_prompt)

    for with_system in (True, False):
        for pieces in _candidates(rendered, tokenizer.bos_token or "", with_system):
            if _agrees(pieces, rendered, with_system):
                if not with_system:
                    log.info("The chat template has no separate system turn, so chats take no system message.")
                return pieces
    log.warning("The chat template cannot be written as a prefix and suffix per role; format chat prompts yourself.")
    return None


def _candidates(rendered: Render, bos: str, with_system: bool) -> list[dict[str, Any]]:
    """Pieces read off marker conversations; more than one where the cut between turns is ambiguous."""
    try:
        plain = rendered([("user", _U)], False)
        prompt = rendered([("user", _U)], True)
        long = rendered([("user", _U), ("assistant", _A), ("user", _U2), ("assistant", _A2), ("user", _U3)], False)
        head, user_to_assistant, assistant_to_user = _between(long, _U, _A, _U2)
        user_suffix = plain.split(_U)[1]
        if not prompt.startswith(plain) or not user_to_assistant.startswith(user_suffix):
            return []
        found = []
        for assistant_suffix in _assistant_suffixes(rendered, head, assistant_to_user):
            user_prefix = assistant_to_user[len(assistant_suffix) :]
            if not head.endswith(user_prefix):
                continue
            preamble = head.removesuffix(user_prefix)
            # SmolLM2's bos token is also what opens every turn; then it is part of the turns.
            start = bos if preamble.startswith(bos) and not user_prefix.startswith(bos) else ""
            roles = {
                "user": {"prefix": user_prefix, "suffix": user_suffix},
                "assistant": {"prefix": user_to_assistant.removeprefix(user_suffix), "suffix": assistant_suffix},
            }
            if with_system:
                before, system_to_user = _between(rendered([("system", _S), ("user", _U)], False), _S, _U)
                if not before.startswith(start) or not system_to_user.endswith(user_prefix):
                    continue
                suffix = system_to_user.removesuffix(user_prefix)
                roles["system"] = {"prefix": before.removeprefix(start), "suffix": suffix}
            default = preamble.removeprefix(start) or None
            opening = prompt.removeprefix(plain)
            found.append({"bos": start, "roles": roles, "generation_prompt": opening, "default_system": default})
        return found
    except Exception as e:  # a template may raise anything, for example on a role it does not take
        log.debug("The chat template does not render a marker conversation: %s", e)
        return []


def _between(text: str, *markers: str) -> list[str]:
    """The texts before each of the markers, which must each appear once and in order."""
    parts = []
    for marker in markers:
        before, found, text = text.partition(marker)
        if not found or marker in text:
            raise ValueError(f"the marker {marker} does not appear exactly once")
        parts.append(before)
    return parts


def _assistant_suffixes(rendered: Render, head: str, assistant_to_user: str) -> list[str]:
    """Where the text between an assistant's and a user's content may be cut: at its end as a last turn shows it, or
    so that the user's prefix is the longest text that also starts the conversation."""
    cuts = []
    last = rendered([("user", _U), ("assistant", _A)], False).split(_A)[-1]
    if assistant_to_user.startswith(last):
        cuts.append(last)
    for i in range(len(assistant_to_user) + 1):
        if head.endswith(assistant_to_user[i:]):
            cuts.append(assistant_to_user[:i])
            break
    return cuts


def _agrees(pieces: dict[str, Any], rendered: Render, with_system: bool) -> bool:
    """Whether the pieces render like the template on conversations with and without a system message and turns."""
    turns: list[Messages] = [
        [("user", "Hello")],
        [("user", "a\nb"), ("assistant", "Yes, it is."), ("user", "Why?")],
        [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5")],
    ]
    if with_system:
        turns += [[("system", "Be brief."), *messages] for messages in turns]
    try:
        return all(render(pieces, messages) == rendered(messages, True) for messages in turns)
    except Exception as e:
        log.debug("The chat template does not render a conversation: %s", e)
        return False
