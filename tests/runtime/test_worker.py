# SPDX-License-Identifier: Apache-2.0
"""The worker thread: what is submitted comes back whole, cancelled or with the reason why not."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from gptq_compile.runtime.engine import Engine
from gptq_compile.runtime.sampling import SamplingSettings
from gptq_compile.runtime.worker import Update, Worker

PROMPTS = [[i, i + 1, i + 2] * (i % 5 + 1) for i in range(1, 12)]


class Inbox:
    """Collects what the worker delivers."""

    def __init__(self) -> None:
        self.updates: queue.SimpleQueue[tuple[Any, Update]] = queue.SimpleQueue()

    def __call__(self, updates: Sequence[tuple[Any, Update]]) -> None:
        for update in updates:
            self.updates.put(update)

    def until_ended(self, count: int) -> dict[Any, list[Update]]:
        """Updates of every request, once ``count`` of them have ended."""
        seen: dict[Any, list[Update]] = {}
        while sum(u[-1].finish_reason is not None for u in seen.values()) < count:
            request, update = self.updates.get(timeout=30)
            seen.setdefault(request, []).append(update)
        return seen


@pytest.fixture
def inbox() -> Inbox:
    return Inbox()


@pytest.fixture
def worker(engine: Engine, inbox: Inbox) -> Iterator[Worker]:
    made = Worker(engine, inbox)
    yield made
    made.close()


def test_requests_come_back_whole(engine: Engine, worker: Worker, inbox: Inbox) -> None:
    requests = [engine.request(p, SamplingSettings(25, do_sample=True, seed=i)) for i, p in enumerate(PROMPTS)]
    for request in requests:
        worker.submit(request)
    seen = inbox.until_ended(len(requests))
    for seed, (prompt, request) in enumerate(zip(PROMPTS, requests, strict=True)):
        alone = engine.generate(prompt, 25, do_sample=True, seed=seed, eos_token_id=[], return_dict_in_generate=True)
        updates = seen[request]
        assert [t for u in updates for t in u.tokens] == alone.token_ids
        assert "".join(u.text for u in updates) == alone.text
        assert [u.finish_reason for u in updates][:-1] == [None] * (len(updates) - 1)
        assert updates[-1].finish_reason == "length" and updates[-1].error is None


def test_cancelling_frees_pages_at_once(engine: Engine, worker: Worker, inbox: Inbox) -> None:
    requests = [engine.request([i] * 20, SamplingSettings(70)) for i in range(8)]  # four run, four wait
    for request in requests:
        worker.submit(request)
    while not requests[0].tokens:
        time.sleep(0.001)
    for request in requests:
        worker.cancel(request)
        worker.cancel(request)
    seen = inbox.until_ended(8)
    assert all(u[-1].finish_reason in ("cancelled", "length") for u in seen.values())
    assert any(u[-1].finish_reason == "cancelled" for u in seen.values())
    assert engine.cache.free_pages == engine.cache.pages
    worker.submit(again := engine.request([1, 2], SamplingSettings(3)))
    assert sum(len(u.tokens) for u in inbox.until_ended(1)[again]) == 3


def test_a_failing_step_is_told_and_the_worker_goes_on(
    engine: Engine, worker: Worker, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("CUDA: launch failure")

    with monkeypatch.context() as patch:
        patch.setattr(engine._model, "forward", failing)
        for prompt in PROMPTS[:2]:
            worker.submit(engine.request(prompt, SamplingSettings(5)))
        for updates in inbox.until_ended(2).values():
            assert updates[-1].finish_reason == "error" and "launch failure" in (updates[-1].error or "")
        assert worker.failure is not None
    worker.submit(engine.request([1], SamplingSettings(5)))
    assert [u[-1].finish_reason for u in inbox.until_ended(1).values()] == ["length"]
    assert worker.failure is None


def test_closing_ends_what_runs(engine: Engine, inbox: Inbox) -> None:
    worker = Worker(engine, inbox)
    worker.submit(engine.request([1], SamplingSettings(90)))
    worker.close()
    assert [u[-1].finish_reason for u in inbox.until_ended(1).values()] == ["cancelled"]
    assert engine.cache.free_pages == engine.cache.pages
