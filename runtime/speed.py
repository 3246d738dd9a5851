# SPDX-License-Identifier: Apache-2.0
"""How fast an artifact generates here: tokens a second, time to the first token."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptq_compile.runtime.engine import Engine
from gptq_compile.runtime.errors import RequestError

_RUNS = 3


@dataclass(frozen=True)
class StepSpeed:
    """Generation of ``batch`` sequences at once.

    Attributes:
        batch: sequences. ``context``: their mean length while they were timed, tokens.
        seconds: median time of one step, which makes a token for each sequence.
    """

    batch: int
    context: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.batch / self.seconds


def step_speed(engine: Engine, batch: int, context: int, steps: int) -> StepSpeed:
    """Measures generation of ``batch`` sequences around ``context`` tokens, after one generation to warm up.

    Raises:
        RequestError: if the sequences do not fit into the context, or there are fewer than two steps.
    """
    length = max(1, context - steps // 2)
    if steps < 2:
        raise RequestError("A step cannot be timed with fewer than 2 tokens. Give a larger --steps.")
    if length + steps > engine.context_length:
        raise RequestError(
            f"{length + steps} tokens do not fit into the {engine.context_length} that a sequence can hold. Give a "
            "smaller --context or --steps."
        )
    prompts = random_prompts(engine, batch, length)
    options: dict[str, Any] = {"max_new_tokens": steps, "eos_token_id": [], "return_dict_in_generate": True}
    engine.generate(prompts, **options)
    seconds = []
    for _ in range(_RUNS):
        results = engine.generate(prompts, **options)
        seconds.append(statistics.median(1 / r.tokens_per_second for r in results))
    return StepSpeed(batch, length + steps // 2, statistics.median(seconds))


def first_token_seconds(engine: Engine, prompt: int) -> float:
    """Median time from a prompt of ``prompt`` tokens to its first token, after one run to warm up.

    Raises:
        RequestError: if the prompt does not fit.
    """
    if not 0 < prompt < engine.context_length:
        raise RequestError(f"A prompt of {prompt} tokens does not fit below {engine.context_length}.")
    ids = random_prompts(engine, 1, prompt)
    seconds = []
    for _ in range(_RUNS + 1):
        engine.cache.forget()  # or the prompt would be found there
        start = time.perf_counter()
        engine.generate(ids, max_new_tokens=1, eos_token_id=[])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def random_prompts(engine: Engine, count: int, length: int) -> list[list[int]]:
    """``count`` lists of ``length`` token ids, always the same."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, engine.manifest.vocab_size, length).tolist() for _ in range(count)]
