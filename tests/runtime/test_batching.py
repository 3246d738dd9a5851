# SPDX-License-Identifier: Apache-2.0
"""What the scheduler shares, takes away and gives back: prefixes, pages of young sequences, logits."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gptq_compile.runtime.engine import Engine
from gptq_compile.runtime.errors import RequestError
from gptq_compile.runtime.sampling import SamplingSettings

LONG = [7 * i % 256 for i in range(50)]


@pytest.fixture
def small(artifact: pathlib.Path) -> Iterator[Engine]:
    """An engine whose cache holds six pages."""
    with Engine.load(artifact, cache_tokens=96) as engine:
        yield engine
        assert engine.cache.free_pages == 6


def greedy(engine: Engine, prompt: Any, count: int = 12, **settings: Any) -> Any:
    return engine.generate(prompt, count, eos_token_id=[], return_dict_in_generate=True, **settings)


def prefilled(engine: Engine) -> int:
    return engine.scheduler.counters.prefilled


def test_a_known_prefix_is_not_computed_again(engine: Engine, toy: ModuleType) -> None:
    first = greedy(engine, LONG)
    assert (first.reused_tokens, prefilled(engine)) == (0, 50)
    other = [*LONG[:40], 1, 2, 3]
    for prompt, shared in ((LONG, 48), (other, 32), (LONG[:48], 32), (LONG[1:], 0)):
        before = prefilled(engine)
        result = greedy(engine, prompt)
        assert result.reused_tokens == shared and prefilled(engine) - before == len(prompt) - shared
        engine.cache.forget()
        alone = greedy(engine, prompt)
        assert alone.reused_tokens == 0 and alone.token_ids == result.token_ids
        engine.cache.forget()
        greedy(engine, LONG)


def test_an_answer_is_known_when_the_conversation_goes_on(engine: Engine) -> None:
    answer = greedy(engine, LONG, 20).token_ids
    following = [*LONG, *answer, 5, 6, 7]
    result = greedy(engine, following)
    assert result.reused_tokens == 64  # 69 tokens of prompt and answer were written: four pages
    engine.cache.forget()
    assert greedy(engine, following).token_ids == result.token_ids


def test_equal_prompts_at_once_are_computed_once(engine: Engine) -> None:
    results = greedy(engine, [LONG] * 4, do_sample=True, seed=[1, 2, 3, 4])
    assert prefilled(engine) == 50 + 3 * 2
    assert len({tuple(r.token_ids) for r in results}) == 4
    for seed, result in enumerate(results, 1):
        assert greedy(engine, LONG, do_sample=True, seed=seed).token_ids == result.token_ids


def test_kept_pages_give_way(small: Engine, engine: Engine) -> None:
    for start in range(8):
        prompt = [(start * 31 + i) % 256 for i in range(40)]
        assert greedy(small, prompt).token_ids == greedy(engine, prompt).token_ids
    assert small.cache.free_pages == 6 and 0 < small.cache.kept_pages <= 6


@pytest.mark.parametrize("growth", [1, 16, 40])
def test_young_sequences_give_their_pages_back_and_come_back(
    small: Engine, engine: Engine, monkeypatch: pytest.MonkeyPatch, growth: int
) -> None:
    prompts = [[i, 2, 3, 4, 5] for i in range(4)]
    settings: dict[str, Any] = {"do_sample": True, "seed": [1, 2, 3, 4], "repetition_penalty": 1.2, "logprobs": 1}
    expected = greedy(engine, prompts, 60, **settings)
    assert engine.scheduler.counters.preempted == 0
    monkeypatch.setattr("gptq_compile.runtime.scheduler.GROWTH_TOKENS", growth)
    results = greedy(small, prompts, 60, **settings)
    assert small.scheduler.counters.preempted > 0
    for one, other in zip(expected, results, strict=True):
        assert one.token_ids == other.token_ids and one.text == other.text
        assert [p.token for p in other.logprobs] == other.token_ids
        np.testing.assert_allclose([p.logprob for p in one.logprobs], [p.logprob for p in other.logprobs], atol=1e-5)


def test_growing_in_steps_changes_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [r.token_ids for r in greedy(engine, [[1], [2, 3], [4] * 16], 70)]
    monkeypatch.setattr("gptq_compile.runtime.scheduler.GROWTH_TOKENS", 1)
    engine.cache.forget()
    assert [r.token_ids for r in greedy(engine, [[1], [2, 3], [4] * 16], 70)] == expected
    assert engine.scheduler.counters.preempted == 0


def test_logprobs(engine: Engine, toy: ModuleType) -> None:
    prompt = [65, 66, 67]
    for settings in ({}, {"do_sample": True, "temperature": 0.5, "seed": 3, "repetition_penalty": 1.5}):
        result = greedy(engine, prompt, 8, logprobs=3, **settings)
        plain = greedy(engine, prompt, 8, **settings)
        assert plain.logprobs is None and plain.token_ids == result.token_ids
        logits = toy.reference_logits(prompt + result.token_ids, toy.toy_weights())[2:-1]
        expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        for row, entry, token in zip(expected, result.logprobs, result.token_ids, strict=True):
            assert entry.token == token and abs(entry.logprob - row[token]) < 1e-4
            best = np.argsort(-row)[:3]
            assert [i for i, _ in entry.top] == best.tolist()
            np.testing.assert_allclose([p for _, p in entry.top], row[best], atol=1e-4)
    assert all(p.top == () for p in greedy(engine, prompt, 3, logprobs=0).logprobs)
    with pytest.raises(RequestError, match="logprobs"):
        greedy(engine, prompt, logprobs=-1)


@pytest.mark.parametrize("chunk", [5, 512])
def test_score(engine: Engine, toy: ModuleType, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("gptq_compile.runtime.device.CpuDevice.prefill_tokens", chunk)
    logits = toy.reference_logits(LONG, toy.toy_weights())[:-1]
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = expected[np.arange(49), LONG[1:]]
    best = logits.argmax(axis=1) == LONG[1:]
    for begin in (1, 49, 30, 33, 34, 16, 17):  # whatever of it the cache knows by then
        likelihood, greedy_ones = engine.score(LONG, begin)
        np.testing.assert_allclose(likelihood, expected[begin - 1 :], atol=5e-5)
        np.testing.assert_array_equal(greedy_ones, best[begin - 1 :])
    answer = greedy(engine, LONG[:20], 9).token_ids
    assert engine.score(LONG[:20] + answer, 20)[1].all()
    for begin in (0, 50, -1):
        with pytest.raises(RequestError, match="not one of 50"):
            engine.score(LONG, begin)


class Cycle:
    """Allows one token after the other, again and again."""

    def __init__(self, tokens: list[int], size: int) -> None:
        self.tokens, self.size, self.taken = tokens, size, 0

    def allowed(self) -> np.ndarray:
        mask = np.zeros(self.size, bool)
        mask[self.tokens[self.taken % len(self.tokens)]] = True
        return mask

    def accept(self, token: int) -> None:
        assert token == self.tokens[self.taken % len(self.tokens)]
        self.taken += 1


def test_a_constraint_rules_tokens_out_for_its_own_sequence_only(engine: Engine, toy: ModuleType) -> None:
    free = greedy(engine, [1, 2, 3], 20)
    plain = SamplingSettings(20)
    sampled = SamplingSettings(20, do_sample=True, seed=5, repetition_penalty=1e9)
    sequences = [
        engine.request([1, 2, 3], plain),
        engine.request([1, 2], plain, Cycle([72, 105], toy.VOCAB)),
        engine.request([9], sampled, Cycle([33, 34, 35], toy.VOCAB)),
    ]
    for sequence in sequences:
        engine.scheduler.submit(sequence)
    while engine.scheduler.running or engine.scheduler.waiting:
        engine.scheduler.step()
    assert sequences[0].tokens == free.token_ids
    assert sequences[1].tokens == [72, 105] * 10 and sequences[1].result().text == "Hi" * 10
    assert sequences[2].tokens == ([33, 34, 35] * 7)[:20]
