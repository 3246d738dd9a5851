# SPDX-License-Identifier: Apache-2.0
"""A thread that runs an engine's requests, for programs that must not wait for it, such as servers.

Nothing here holds the scheduler's lock but the thread itself, so that ``submit`` and ``cancel`` return at once even
while a step runs.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gptq_compile.runtime.engine import Engine
from gptq_compile.runtime.errors import RuntimeFailure
from gptq_compile.runtime.hosted import TokenLogprob
from gptq_compile.runtime.sequence import Sequence as Request

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """What became of a request since its last update.

    Attributes:
        text: new text; may be empty while a character or a stop string is incomplete.
        tokens: new tokens. ``logprobs``: theirs, if the request asked for them.
        finish_reason: None while it runs; ``"eos"``, ``"stop"``, ``"length"``, ``"cancelled"``, ``"invalid"`` (NaN or
            infinite logits) or ``"error"``.
        error: what went wrong, as a sentence, where the reason is one of the last two.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None
    error: str | None = None


Deliver = Callable[[Sequence[tuple[Request, Update]]], None]


class Worker:
    """Runs requests on a thread of its own until it is closed.

    Attributes:
        failure: the sentence of the last step that failed; None once a step has succeeded again.
    """

    def __init__(self, engine: Engine, deliver: Deliver) -> None:
        """Starts the thread.

        Args:
            engine: whose scheduler runs the requests.
            deliver: called on the thread after every step with what changed; it must return soon.
        """
        self.failure: str | None = None
        self._engine, self._deliver = engine, deliver
        self._orders: queue.SimpleQueue[tuple[str, Request | None]] = queue.SimpleQueue()
        self._told: dict[Request, int] = {}  # requests that have not ended -> tokens that were delivered
        self._thread = threading.Thread(target=self._run, name="gptq-compile worker", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queues a request made by ``Engine.request``; may be called from any thread."""
        self._orders.put(("submit", request))

    def cancel(self, request: Request) -> None:
        """Ends a request and frees its pages before the next step; one that has ended already stays as it is."""
        self._orders.put(("cancel", request))

    def close(self) -> None:
        """Cancels what is running and ends the thread."""
        self._orders.put(("close", None))
        self._thread.join()

    def _run(self) -> None:
        while True:
            idle = not self._told
            try:
                while True:
                    order, request = self._orders.get(block=idle)
                    idle = False
                    if not self._obey(order, request):
                        return
            except queue.Empty:
                pass
            if self._told:
                self._step()

    def _obey(self, order: str, request: Request | None) -> bool:
        scheduler = self._engine.scheduler
        if request is None:
            for running in list(self._told):
                scheduler.cancel(running)
            self._report()
            return False
        if order == "submit":
            self._told[request] = 0
            scheduler.submit(request)
        elif request in self._told:
            scheduler.cancel(request)
            self._report()
        return True

    def _step(self) -> None:
        try:
            self._engine.scheduler.step()
            self.failure = None
        except Exception as error:
            # Nobody waits for this thread: whatever happened must reach those who wait for its requests.
            sentence = str(error) if isinstance(error, RuntimeFailure) else f"Internal error ({error!r})."
            log.error("%s", sentence, exc_info=not isinstance(error, RuntimeFailure))
            self.failure = sentence
            for request in list(self._told):
                self._engine.scheduler.cancel(request)
        self._report()

    def _report(self) -> None:
        updates = []
        for request, told in list(self._told.items()):
            ended = request.finish_reason
            if ended is None and len(request.tokens) == told:
                continue
            text = ""
            while request.pieces:
                text += request.pieces.popleft()
            tokens, logprobs = tuple(request.tokens[told:]), tuple(request.logprobs[told:])
            error = None
            if ended == "cancelled" and self.failure is not None:
                ended, error = "error", self.failure
            elif ended == "invalid":
                error = "The model computed NaN or infinite logits."
            updates.append((request, Update(text, tokens, logprobs, ended, error)))
            self._told[request] = len(request.tokens)
            if ended is not None:
                del self._told[request]
        if updates:
            self._deliver(updates)
