# SPDX-License-Identifier: Apache-2.0
"""Between the event loop and the worker thread: who waits for which sequences, for how long, and what is counted."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence

from gptq_compile.runtime.engine import Engine
from gptq_compile.runtime.sequence import Sequence as Request
from gptq_compile.runtime.worker import Update, Worker
from gptq_compile.serve.errors import Refusal
from gptq_compile.serve.metrics import Counter, Histogram, Reading, render
from gptq_compile.serve.settings import ServeSettings

BEAT_SECONDS = 15.0  # without news; a stream then says that it is alive
# A client asks again by itself after most failures of a server; after these it would only fail again.
_NO_RETRY = {"x-should-retry": "false"}


class Ticket:
    """The sequences of one HTTP request, as one stream of updates."""

    def __init__(self, requests: Sequence[Request], deadline: float) -> None:
        self.requests = list(requests)
        self.deadline = deadline
        self.started = time.monotonic()
        self.begun: set[int] = set()  # sequences that have a token
        self.inbox: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()

    async def updates(self) -> AsyncIterator[tuple[int, Update] | None]:
        """(index of the sequence, what is new), until all of them have ended; None after a while without news.

        Raises:
            Refusal: if the time is up or the model failed.
        """
        open_ones = set(range(len(self.requests)))
        while open_ones:
            now = asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout_at(min(self.deadline, now + BEAT_SECONDS)):
                    index, update = await self.inbox.get()
            except TimeoutError:
                if now + BEAT_SECONDS < self.deadline:
                    yield None
                    continue
                raise Refusal(
                    504, "The request took longer than this server allows.", "timeout", headers=_NO_RETRY
                ) from None
            if update.error is not None:
                raise Refusal(500, update.error, "model_failure", headers=_NO_RETRY)
            if update.finish_reason == "cancelled":
                raise Refusal(503, "The server is shutting down.", "shutting_down")
            yield index, update
            if update.finish_reason is not None:
                open_ones.discard(index)


class Service:
    """Admits requests to an engine and counts what becomes of them. Everything but the worker is on one event loop."""

    def __init__(self, engine: Engine, settings: ServeSettings) -> None:
        self.engine, self.settings = engine, settings
        self._tickets: dict[Request, tuple[Ticket, int]] = {}
        self._worker: Worker | None = None
        self.http_requests = Counter("http_requests_total", "Answers by route and status.", ("route", "status"))
        self._submitted = Counter("sequences_submitted_total", "Sequences that were admitted.")
        self._finished = Counter("sequences_finished_total", "Sequences by how they ended.", ("reason",))
        self._prompt_tokens = Counter("prompt_tokens_total", "Tokens of the prompts of admitted sequences.")
        self._tokens = Counter("generated_tokens_total", "Tokens that were generated.")
        self._first = Histogram("time_to_first_token_seconds", "From admission to the first token.")
        self._whole = Histogram("sequence_seconds", "From admission to the end.")
        scheduler, cache = engine.scheduler, engine.cache
        counters = scheduler.counters
        self._metrics: list[Counter | Reading | Histogram] = [
            self.http_requests,
            self._submitted,
            self._finished,
            self._prompt_tokens,
            Reading(
                "reused_prompt_tokens_total", "Prompt tokens found in the cache.", lambda: counters.reused, "counter"
            ),
            Reading("prefilled_tokens_total", "Tokens computed by prefill.", lambda: counters.prefilled, "counter"),
            self._tokens,
            Reading("decode_steps_total", "Decode steps.", lambda: counters.steps, "counter"),
            Reading(
                "preemptions_total", "Sequences that had to give pages back.", lambda: counters.preempted, "counter"
            ),
            self._first,
            self._whole,
            Reading("sequences_unfinished", "Sequences that run or wait.", lambda: len(self._tickets)),
            Reading("sequences_running", "Sequences that have pages.", lambda: scheduler.running),
            Reading("sequences_waiting", "Sequences that wait for pages.", lambda: scheduler.waiting),
            Reading("cache_pages", "Pages of the KV cache.", lambda: cache.pages),
            Reading("cache_pages_free", "Pages that no sequence has.", lambda: cache.free_pages),
            Reading("cache_pages_kept", "Free pages whose text can be found.", lambda: cache.kept_pages),
        ]

    @property
    def failure(self) -> str | None:
        """Why nothing can be answered; None if all is well."""
        return self._worker.failure if self._worker is not None else "The worker has not started."

    def start(self) -> None:
        """Starts the worker; on the event loop."""
        loop = asyncio.get_running_loop()
        self._worker = Worker(self.engine, lambda updates: _post(loop, self._dispatch, list(updates)))

    async def stop(self) -> None:
        """Ends what runs and the worker."""
        if self._worker is not None:
            await asyncio.to_thread(self._worker.close)
            self._worker = None

    def metrics(self) -> str:
        """Prometheus' page."""
        return render(self._metrics)

    def open(self, requests: Sequence[Request]) -> Ticket:
        """Runs sequences until ``close``.

        Raises:
            Refusal: if too many run or wait already.
        """
        if self._worker is None:
            raise Refusal(503, "The server is shutting down.", "shutting_down")
        if len(self._tickets) + len(requests) > self.settings.max_queue:
            raise Refusal(
                503,
                f"{len(self._tickets)} sequences run or wait, and this server takes {self.settings.max_queue}. "
                "Try again later.",
                "queue_full",
                headers={"Retry-After": "1"},
            )
        ticket = Ticket(requests, asyncio.get_running_loop().time() + self.settings.timeout_seconds)
        for index, request in enumerate(requests):
            self._tickets[request] = (ticket, index)
            self._submitted.add(1)
            self._prompt_tokens.add(len(request.prompt))
            self._worker.submit(request)
        return ticket

    def close(self, ticket: Ticket) -> None:
        """Cancels those of a ticket's sequences that have not ended."""
        for request in ticket.requests:
            if request in self._tickets and self._worker is not None:
                self._worker.cancel(request)

    def _dispatch(self, updates: list[tuple[Request, Update]]) -> None:
        now = time.monotonic()
        for request, update in updates:
            ticket, index = self._tickets[request]
            self._tokens.add(len(update.tokens))
            if update.tokens and index not in ticket.begun:
                ticket.begun.add(index)
                self._first.add(now - ticket.started)
            ticket.inbox.put_nowait((index, update))
            if update.finish_reason is not None:
                del self._tickets[request]
                self._finished.add(1, update.finish_reason)
                self._whole.add(now - ticket.started)


def _post(loop: asyncio.AbstractEventLoop, call: object, *arguments: object) -> None:
    # Once the loop has ended nobody waits any more.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *arguments)  # type: ignore[arg-type]
