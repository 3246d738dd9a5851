# SPDX-License-Identifier: Apache-2.0
"""OpenAI's answers, whole and in chunks, made from a ticket's updates."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from gptq_compile.runtime.hosted import TokenLogprob
from gptq_compile.runtime.sequence import Sequence as Request
from gptq_compile.runtime.tokenizer import Tokenizer
from gptq_compile.runtime.worker import Update

_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


class Answer:
    """Collects the choices of one request. ``chat`` decides between the two formats."""

    def __init__(
        self,
        chat: bool,
        model: str,
        requests: Sequence[Request],
        each: int,
        tokenizer: Tokenizer | None,
        echo: Sequence[str] = (),
    ) -> None:
        """``requests`` are ``each`` choices for every prompt; ``echo`` is the prompt of each choice, if it is shown."""
        self._each = each
        self._chat, self._requests, self._tokenizer = chat, requests, tokenizer
        self._texts: list[list[str]] = [[e] for e in echo] or [[] for _ in requests]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in requests]
        self._reasons: list[str | None] = [None] * len(requests)
        self._offsets = [len(e) for e in echo] or [0] * len(requests)  # of the next token in the text
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens of all choices; a prompt counts once for all that were made from it."""
        first = self._requests[:: self._each]
        prompt = sum(len(r.prompt) for r in first)
        generated = sum(len(r.tokens) for r in self._requests)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": sum(r.reused for r in first)},
        }

    def add(self, index: int, update: Update) -> None:
        """Takes an update of one choice."""
        self._texts[index].append(update.text)
        self._logprobs[index] += self._shown(index, update)
        if update.finish_reason is not None:
            self._reasons[index] = _REASONS[update.finish_reason]

    def whole(self) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        choices = []
        for i, texts in enumerate(self._texts):
            text = "".join(texts)
            content = (
                {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
            )
            wanted = self._requests[i].settings.logprobs is not None
            logprobs = self._format(i, self._logprobs[i]) if wanted else None
            choices.append({"index": i, **content, "logprobs": logprobs, "finish_reason": self._reasons[i]})
        return {**self._head, "choices": choices, "usage": self.usage}

    def opening(self) -> list[dict[str, Any]]:
        """The chunks that come before any token: the role of each choice of a chat, the prompt where it is echoed."""
        if self._chat:
            return [self._chunk(i, {"delta": {"role": "assistant", "content": ""}}) for i in range(len(self._requests))]
        return [self._chunk(i, {"text": t[0]}) for i, t in enumerate(self._texts) if t]

    def chunks(self, index: int, update: Update) -> list[dict[str, Any]]:
        """The chunks of an update: what is new, then the end."""
        chunks = []
        shown = self._shown(index, update)
        logprobs = self._format(index, shown) if shown else None
        if update.text or logprobs:
            content = {"delta": {"content": update.text}} if self._chat else {"text": update.text}
            chunks.append(self._chunk(index, content, logprobs))
        if update.finish_reason is not None:
            end: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
            chunks.append(self._chunk(index, end, reason=_REASONS[update.finish_reason]))
        return chunks

    def usage_chunk(self) -> dict[str, Any]:
        """The chunk without choices that ``stream_options.include_usage`` asks for."""
        return {**self._head, **self._object, "choices": [], "usage": self.usage}

    @property
    def _object(self) -> dict[str, str]:
        return {"object": "chat.completion.chunk"} if self._chat else {}

    def _chunk(
        self, index: int, content: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, **self._object, "choices": [choice]}

    def _shown(self, index: int, update: Update) -> Sequence[TokenLogprob]:
        """Log-probabilities of the tokens that are part of the text: not of the end token."""
        return update.logprobs[:-1] if update.finish_reason == "eos" else update.logprobs

    def _format(self, index: int, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        if self._chat:
            return {"content": [self._chat_entry(e) for e in entries], "refusal": None}
        tokens = [self._piece(e.token) for e in entries]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [e.logprob for e in entries],
            "top_logprobs": [{self._piece(t): p for t, p in e.top} for e in entries],
            "text_offset": offsets,
        }

    def _chat_entry(self, entry: TokenLogprob) -> dict[str, Any]:
        top = [{**self._named(t), "logprob": p} for t, p in entry.top]
        return {**self._named(entry.token), "logprob": entry.logprob, "top_logprobs": top}

    def _named(self, token: int) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token) if self._tokenizer is not None else b""
        return {"token": data.decode("utf-8", "replace"), "bytes": list(data)}

    def _piece(self, token: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token}"
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            # As OpenAI writes it; two different ones must not become one key.
            return "bytes:" + "".join(f"\\x{b:02x}" for b in data)
