# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: which tokens go into the next call of the model (Orca, Yu et al. 2022, section 3.1).

Waiting sequences are admitted when a row and their pages are free; prompts are prefilled in chunks that may hold tokens
of several sequences; between chunks the running sequences decode together in the smallest bucket that holds them.

Pages are taken as a sequence grows. When there are none left, the youngest sequence gives its own back and waits; it is
prefilled again later with what it has generated so far (recomputation, Kwon et al. 2023, section 4.5).
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

import numpy as np

from gptq_compile.runtime.cache import PagedCache
from gptq_compile.runtime.decode import DecodeBatch, sampling_columns, seen_matrix
from gptq_compile.runtime.device import CpuDevice
from gptq_compile.runtime.errors import DeviceError, RuntimeFailure
from gptq_compile.runtime.hosted import needs_host, through_host
from gptq_compile.runtime.prefill import Chunk, run_forward
from gptq_compile.runtime.sequence import Sequence
from gptq_compile.runtime.trace import Trace
from gptq_compile.runtime.vm import Model, first_line

GROWTH_TOKENS = 256  # taken at once: decoding stops launching ahead when a row has used its pages up


@dataclass
class Counters:
    """What the scheduler has done since it was made; tokens, calls and sequences.

    Attributes:
        prefilled: tokens computed by prefill. ``reused``: prompt tokens that were in the cache already.
        decoded: tokens that decode steps made. ``steps``: decode steps whose tokens were read.
        preempted: sequences that had to give their pages back.
    """

    prefilled: int = 0
    reused: int = 0
    decoded: int = 0
    steps: int = 0
    preempted: int = 0


class Scheduler:
    """Runs sequences on one model. ``step`` may be called from several threads; each step serves all of them.

    Attributes:
        trace: is told what the model does and, in a row for each request, what becomes of it.
    """

    def __init__(self, device: CpuDevice, model: Model, cache: PagedCache, vocab: int, max_batch: int) -> None:
        self.lock = threading.RLock()
        self.counters = Counters()
        self.trace = Trace()
        self._device, self._model, self._cache, self._vocab = device, model, cache, vocab
        self._max_rows = min(max_batch, max(model.decode))
        self._waiting: deque[Sequence] = deque()
        self._prefilling: list[Sequence] = []
        self._running: list[Sequence] = []
        self._rows: list[Sequence] = []  # what the current batch was loaded with
        self._batches: dict[int, DecodeBatch] = {}
        self._batch: DecodeBatch | None = None
        self._budget = 0  # steps that may be launched before some row reaches its limit or the end of its pages
        self._decode_next = False
        self._submitted = 0

    @property
    def waiting(self) -> int:
        """Sequences that have no pages yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences that have pages."""
        return len(self._prefilling) + len(self._running)

    def submit(self, sequence: Sequence) -> None:
        """Queues a sequence."""
        with self.lock:
            self._submitted += 1
            sequence.order = self._submitted
            self._waiting.append(sequence)
            self.trace.enter(_row(sequence), "queue", prompt_tokens=len(sequence.prompt), limit=sequence.limit)

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence and gives its pages back."""
        with self.lock:
            if sequence.finish_reason is None:
                sequence.cancel()
            if sequence in self._waiting:
                self._waiting.remove(sequence)
                self._tell_end(sequence)
            self._retire()

    def step(self) -> None:
        """Runs one chunk of prefill or one decode step, whichever is due."""
        with self.lock, self._device.stream():
            try:
                self._admit()
                if self._prefilling and not (self._decode_next and self._running):
                    self._prefill()
                    self._decode_next = True
                elif self._running:
                    with self.trace.span("model", "decode", sequences=len(self._running)):
                        self._decode()
                    self._decode_next = False
            except BaseException as error:
                # Whatever was in flight is computed again from the tokens the host knows.
                if self._batch is not None:
                    self._batch.abandon()
                    self._batch = None
                if isinstance(error, Exception) and not isinstance(error, RuntimeFailure):
                    raise DeviceError(f"The compiled model failed while it ran: {first_line(error)}.") from error
                raise
            finally:
                self._retire()

    def close(self) -> None:
        """Frees graphs and pinned memory."""
        with self.lock, self._device.stream():
            self._device.synchronize()
            for batch in self._batches.values():
                batch.close()
            self._batches, self._batch = {}, None

    def _admit(self) -> None:
        while self._waiting and self.running < self._max_rows:
            sequence = self._waiting[0]
            ids = sequence.cached_ids
            # The last token of a prompt is always computed: its logits are wanted.
            sharable = ids if sequence.tokens else ids[:-1]
            if self._about_to_know(sharable):
                return
            admitted = self._cache.admit(sharable, min(sequence.final_length, len(ids) + GROWTH_TOKENS))
            if admitted is None:
                return
            self._waiting.popleft()
            sequence.page_row, sequence.prefilled = admitted
            if not sequence.tokens:
                sequence.reused = sequence.prefilled
                self.counters.reused += sequence.reused
            prefill = sequence.prefilled < len(ids)
            (self._prefilling if prefill else self._running).append(sequence)
            phase = "prefill" if prefill else "decode"
            self.trace.enter(_row(sequence), phase, tokens=len(ids), in_cache=sequence.prefilled)

    def _about_to_know(self, ids: list[int]) -> bool:
        """Whether a prompt in the works will put more of ``ids`` into the cache, so that waiting for it pays."""
        known = self._cache.known(ids)
        end = known + self._cache.page_size
        return end <= len(ids) and any(s.prompt[:end] == ids[:end] for s in self._prefilling)

    def _retire(self) -> None:
        for group in (self._prefilling, self._running):
            for sequence in [s for s in group if s.finish_reason is not None]:
                group.remove(sequence)
                self._give_back(sequence)
                self._tell_end(sequence)

    def _tell_end(self, sequence: Sequence) -> None:
        if self.trace.on:
            row = _row(sequence)
            self.trace.mark(row, sequence.finish_reason or "gone", tokens=len(sequence.tokens))
            self.trace.enter(row, None)

    def _give_back(self, sequence: Sequence) -> None:
        """Releases a sequence's pages; what they hold can be found until they are needed."""
        if sequence.page_row is None:
            return
        if sequence.finish_reason != "invalid":
            self._cache.record(sequence.page_row, sequence.cached_ids[: sequence.prefilled])
        # Steps in flight may still write there, behind what was recorded; they come before any later owner's on the
        # stream.
        self._cache.release(sequence.page_row)
        sequence.page_row, sequence.prefilled = None, 0

    def _preempt(self, sequence: Sequence) -> None:
        (self._running if sequence in self._running else self._prefilling).remove(sequence)
        self._give_back(sequence)
        self._waiting.appendleft(sequence)
        self.counters.preempted += 1
        self.trace.enter(_row(sequence), "queue", preempted=True)

    def _prefill(self) -> None:
        chunk = Chunk(self._cache)
        parts: list[tuple[Sequence, int]] = []  # and where each will have come to
        for sequence in self._prefilling:
            assert sequence.page_row is not None
            ids = sequence.cached_ids
            count = min(len(ids) - sequence.prefilled, self._device.prefill_tokens - chunk.tokens)
            if count <= 0:
                break
            end = sequence.prefilled + count
            chunk.add(ids[sequence.prefilled : end], sequence.prefilled, sequence.page_row)
            if end == len(sequence.prompt) and not sequence.tokens:
                chunk.want_last()
            parts.append((sequence, end))
        with self.trace.span("model", "prefill", tokens=chunk.tokens, sequences=len(parts)):
            logits = run_forward(self._device, self._model, self._cache, chunk)
            fresh = [s for s, end in parts if end == len(s.prompt) and not s.tokens]
            tokens = dict(zip(map(id, fresh), self._first_tokens(logits, fresh), strict=True)) if fresh else {}
        self.counters.prefilled += chunk.tokens
        for sequence, end in parts:
            sequence.prefilled = end
            if end < len(sequence.cached_ids):
                continue
            self._prefilling.remove(sequence)
            self._running.append(sequence)
            self.trace.enter(_row(sequence), "decode")
            if id(sequence) in tokens:
                self._accept_token(sequence, int(tokens[id(sequence)]))
            if sequence.finish_reason != "invalid" and sequence.page_row is not None:
                self._cache.record(sequence.page_row, sequence.prompt)

    def _first_tokens(self, logits: object, ready: list[Sequence]) -> np.ndarray:
        device, model = self._device, self._model
        if needs_host(ready):
            logits = through_host(device, logits, ready)
        temperature, top_k, top_p, min_p, seeds, penalty = (
            device.staged(f"sample.{i}", c) for i, c in enumerate(sampling_columns(ready, len(ready)))
        )
        if any(s.settings.repetition_penalty != 1.0 for s in ready):
            seen = device.staged("sample.seen", seen_matrix(ready, len(ready), self._vocab))
            logits = model.repetition_penalty(logits, seen, penalty)
        positions = device.staged("sample.positions", np.array([len(s.prompt) - 1 for s in ready], "int32"))
        return device.download(model.sample(logits, temperature, top_k, top_p, min_p, seeds, positions))

    def _decode(self) -> None:
        batch = self._batch
        if batch is None or self._rows != self._running or (self._budget <= 0 and not batch.in_flight):
            self._drain()
            self._retire()
            self._grow()
            if not self._running:
                return
            batch = self._load()
        while batch.in_flight < batch.depth and self._budget > 0:
            batch.launch()
            self._budget -= 1
        self._accept(batch)

    def _grow(self) -> None:
        """Makes room for one token more in every row, taking pages from the youngest sequences if it must."""
        for sequence in sorted(self._running, key=lambda s: s.order):
            while sequence.page_row is not None and self._room(sequence) < 1:
                wanted = min(sequence.final_length, sequence.length + GROWTH_TOKENS)
                if not self._cache.extend(sequence.page_row, wanted):
                    self._preempt(max([*self._running, *self._prefilling], key=lambda s: s.order))

    def _room(self, sequence: Sequence) -> int:
        """Decode steps that a sequence's pages have room for: the next writes at position ``length - 1``."""
        assert sequence.page_row is not None
        return self._cache.room(sequence.page_row) - (sequence.length - 1)

    def _load(self) -> DecodeBatch:
        size = min(b for b in self._model.decode if b >= len(self._running))
        if size not in self._batches:
            self._batches[size] = DecodeBatch(self._device, self._model, self._cache, size, self._vocab)
        self._rows = list(self._running)
        batch = self._batch = self._batches[size]
        batch.load(self._rows)
        self._budget = min(min(s.remaining, self._room(s)) for s in self._rows)
        return batch

    def _drain(self) -> None:
        while self._batch is not None and self._batch.in_flight:
            self._accept(self._batch)

    def _accept(self, batch: DecodeBatch) -> None:
        self.counters.steps += 1
        for sequence, token in zip(self._rows, batch.collect(), strict=False):
            if sequence.finish_reason is None:
                self._accept_token(sequence, int(token))
                sequence.prefilled = sequence.length - 1
                self.counters.decoded += 1

    def _accept_token(self, sequence: Sequence, token: int) -> None:
        sequence.accept(token)
        if self.trace.on:
            self.trace.mark(_row(sequence), "token", id=token, number=len(sequence.tokens))


def _row(sequence: Sequence) -> str:
    return f"request {sequence.order}"
