# SPDX-License-Identifier: Apache-2.0
"""One request while it runs: its tokens, its text, why it ended."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Ids
from dataclasses import dataclass

import numpy as np

from gptq_compile.runtime.hosted import Constraint, TokenLogprob, token_logprob
from gptq_compile.runtime.sampling import SamplingSettings
from gptq_compile.runtime.tokenizer import IncrementalDecoder, StopScanner, Tokenizer


@dataclass(frozen=True)
class GenerationResult:
    """What one prompt became.

    Attributes:
        text: the generated text, without special tokens and without the stop string.
        token_ids: the generated tokens, the end token included.
        finish_reason: ``"eos"``, ``"stop"`` (a stop string) or ``"length"``.
        prompt_tokens: length of the prompt.
        reused_tokens: how many of those were in the KV cache already.
        prefill_seconds: from submission to the first token, waiting included.
        decode_seconds: from the first token to the last.
        logprobs: of every token, if the settings ask for them.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    reused_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = None

    @property
    def tokens_per_second(self) -> float:
        """Decode speed of this sequence; 0 if it has fewer than two tokens."""
        steps = len(self.token_ids) - 1
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds > 0 else 0.0


class Sequence:
    """A prompt, the tokens generated so far, and the text they make.

    Attributes:
        limit: most tokens it may generate (settings and context).
        constraint: decides which tokens may come next; None for all.
        order: when it was submitted, among all of them.
        page_row: its page table row while it is admitted.
        prefilled: its first tokens that are in the cache, for certain.
        reused: prompt tokens that were in the cache when it was first admitted.
        seen_logits: the row of logits that the next token is drawn from, if log-probabilities are wanted.
        logprobs: of every token so far, if they are wanted.
        pieces: text that nobody has fetched yet.
        finish_reason: None while it runs; also ``"cancelled"``, and ``"invalid"`` after NaN or infinite logits, which
            the sample entry reports as a negative token.
    """

    def __init__(
        self,
        prompt: Ids[int],
        settings: SamplingSettings,
        limit: int,
        tokenizer: Tokenizer | None,
        constraint: Constraint | None = None,
    ) -> None:
        self.prompt = list(prompt)
        self.settings = settings
        self.limit = limit
        self.constraint = constraint
        self.order = 0
        self.tokens: list[int] = []
        self.page_row: np.ndarray | None = None
        self.prefilled = self.reused = 0
        self.seen_logits: np.ndarray | None = None
        self.logprobs: list[TokenLogprob] = []
        self.pieces: deque[str] = deque()
        self.finish_reason: str | None = None
        self._text: list[str] = []
        self._decoder = IncrementalDecoder(tokenizer)
        self._scanner = StopScanner(settings.stop)
        self._submitted = time.perf_counter()
        self._first_token = self._last_token = self._submitted

    @property
    def length(self) -> int:
        """Tokens of prompt and output together."""
        return len(self.prompt) + len(self.tokens)

    @property
    def final_length(self) -> int:
        """The most tokens that it can come to."""
        return len(self.prompt) + self.limit

    @property
    def cached_ids(self) -> list[int]:
        """The tokens that must be in the cache before it decodes: all but the last one that was generated."""
        return self.prompt + self.tokens[:-1] if self.tokens else self.prompt

    @property
    def remaining(self) -> int:
        """Tokens it may still generate."""
        return self.limit - len(self.tokens)

    def accept(self, token: int) -> None:
        """Appends a generated token, and finishes if it is the last."""
        if self.finish_reason is not None:
            return
        if token < 0:
            self._finish("invalid")
            return
        self._last_token = time.perf_counter()
        if not self.tokens:
            self._first_token = self._last_token
        self.tokens.append(token)
        if self.seen_logits is not None:
            self.logprobs.append(token_logprob(self.seen_logits, token, self.settings.logprobs or 0))
            self.seen_logits = None
        if token in self.settings.eos_token_ids:
            self._finish("eos")
            return
        if self.constraint is not None:
            self.constraint.accept(token)
        self._emit(self._scanner.push(self._decoder.push(token)))
        if self._scanner.stopped:
            self.finish_reason = "stop"
        elif self.remaining <= 0:
            self._finish("length")

    def cancel(self) -> None:
        """Ends it from outside."""
        if self.finish_reason is None:
            self.finish_reason = "cancelled"

    def result(self) -> GenerationResult:
        """Everything about it, once it is finished."""
        return GenerationResult(
            text="".join(self._text),
            token_ids=list(self.tokens),
            finish_reason=self.finish_reason or "running",
            prompt_tokens=len(self.prompt),
            prefill_seconds=self._first_token - self._submitted,
            decode_seconds=self._last_token - self._first_token,
            reused_tokens=self.reused,
            logprobs=tuple(self.logprobs) if self.settings.logprobs is not None else None,
        )

    def _finish(self, reason: str) -> None:
        # What was held back comes out now; it may still complete a stop string.
        self._emit(self._scanner.push(self._decoder.flush()))
        self.finish_reason = "stop" if self._scanner.stopped else reason
        self._emit(self._scanner.flush())

    def _emit(self, text: str) -> None:
        if text:
            self._text.append(text)
            self.pieces.append(text)
