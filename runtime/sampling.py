# SPDX-License-Identifier: Apache-2.0
"""Settings of one request, with the names of Hugging Face's GenerationMixin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gptq_compile.runtime.errors import RequestError


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are chosen and when generation ends.

    Attributes:
        max_new_tokens: most tokens to generate.
        do_sample: draw from the distribution; otherwise take the most likely token.
        temperature: divides the logits (> 0 when sampling).
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches this.
        min_p: keep tokens at least this times as likely as the most likely one.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen (CTRL, section 4.1).
        seed: of the counter-based random numbers.
        stop: strings that end the text (they are not part of it).
        eos_token_ids: tokens that end it.
        logprobs: report each token's log-probability and those of so many likeliest tokens; None reports nothing.
    """

    max_new_tokens: int = 128
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Raises RequestError if a value is out of its range."""
        _require(
            _whole(self.max_new_tokens) and self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "1 or more"
        )
        if self.do_sample:
            good = _number(self.temperature) and self.temperature > 0
            _require(good, "temperature", self.temperature, "greater than 0 (use do_sample=False for greedy)")
        _require(_whole(self.top_k) and 0 <= self.top_k < 1 << 31, "top_k", self.top_k, "0 (off) or more")
        _require(_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1")
        good = _number(self.repetition_penalty) and self.repetition_penalty > 0
        _require(good, "repetition_penalty", self.repetition_penalty, "greater than 0")
        _require(_whole(self.seed), "seed", self.seed, "a whole number")
        good = self.logprobs is None or (_whole(self.logprobs) and self.logprobs >= 0)
        _require(good, "logprobs", self.logprobs, "0 or more, or None")
        _require(all(isinstance(s, str) and s for s in self.stop), "stop", self.stop, "text that is not empty")

    @property
    def device_row(self) -> tuple[float, int, float, float, int]:
        """(temperature, top_k, top_p, min_p, seed) as the sample entry takes them; temperature 0 is greedy."""
        seed = (self.seed & 0xFFFFFFFF) - ((self.seed & 0x80000000) << 1)
        if not self.do_sample:
            return 0.0, 1, 1.0, 0.0, seed
        return self.temperature, self.top_k, self.top_p, self.min_p, seed


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Normalizes the ``stop`` argument."""
    return () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise RequestError(f"{name} is {value!r}; it must be {allowed}.")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
