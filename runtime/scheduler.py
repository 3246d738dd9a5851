# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: which tokens go into the next call of the model (Orca, Yu et al. 2022, section 3.1).

Waiting sequences are admitted when a row and their pages are free; prompts are prefilled in chunks that may hold tokens
of several sequences; between chunks the running sequences decode together in the smallest bucket that holds them.
"""

from __future__ import annotations

import threading
from collections import deque

import numpy as np

from gptq_compile.runtime.cache import PagedCache
from gptq_compile.runtime.decode import DecodeBatch, sampling_columns, seen_matrix
from gptq_compile.runtime.device import CpuDevice
from gptq_compile.runtime.errors import DeviceError, RuntimeFailure
from gptq_compile.runtime.prefill import Chunk, run_forward
from gptq_compile.runtime.sequence import Sequence
from gptq_compile.runtime.vm import Model, first_line

PREFILL_TOKENS = 512


class Scheduler:
    """Runs sequences on one model. ``step`` may be called from several threads; each step serves all of them."""

    def __init__(self, device: CpuDevice, model: Model, cache: PagedCache, vocab: int, max_batch: int) -> None:
        self.lock = threading.RLock()
        self._device, self._model, self._cache, self._vocab = device, model, cache, vocab
        self._max_rows = min(max_batch, max(model.decode))
        self._waiting: deque[Sequence] = deque()
        self._prefilling: list[Sequence] = []
        self._running: list[Sequence] = []
        self._rows: list[Sequence] = []  # what the current batch was loaded with
        self._batches: dict[int, DecodeBatch] = {}
        self._batch: DecodeBatch | None = None
        self._budget = 0  # steps that may be launched before some row reaches its limit
        self._decode_next = False

    def submit(self, sequence: Sequence) -> None:
        """Queues a sequence."""
        with self.lock:
            self._waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence and gives its pages back."""
        with self.lock:
            if sequence.finish_reason is None:
                sequence.cancel()
            if sequence in self._waiting:
                self._waiting.remove(sequence)
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
        while self._waiting and len(self._prefilling) + len(self._running) < self._max_rows:
            sequence = self._waiting[0]
            # Pages for its whole life: it can never run out in the middle, and nothing is ever evicted.
            need = len(sequence.prompt) + sequence.limit
            if not self._cache.fits(need):
                return
            sequence.page_row = self._cache.allocate(need)
            self._prefilling.append(self._waiting.popleft())

    def _retire(self) -> None:
        for group in (self._prefilling, self._running):
            for sequence in [s for s in group if s.finish_reason is not None]:
                group.remove(sequence)
                if sequence.page_row is not None:
                    # Steps in flight may still write there; they come before any later owner's on the stream.
                    self._cache.release(sequence.page_row)
                    sequence.page_row = None

    def _prefill(self) -> None:
        chunk = Chunk(self._cache)
        ready: list[Sequence] = []
        for sequence in self._prefilling:
            assert sequence.page_row is not None
            count = min(len(sequence.prompt) - sequence.prefilled, PREFILL_TOKENS - chunk.tokens)
            if count <= 0:
                break
            end = sequence.prefilled + count
            chunk.add(sequence.prompt[sequence.prefilled : end], sequence.prefilled, sequence.page_row)
            if end == len(sequence.prompt):
                chunk.want_last()
                ready.append(sequence)
            sequence.prefilled = end
        try:
            logits = run_forward(self._device, self._model, self._cache, chunk)
            tokens = self._first_tokens(logits, ready) if ready else np.empty(0, "int32")
        except BaseException:
            for sequence in self._prefilling:
                sequence.prefilled = 0
            raise
        for sequence, token in zip(ready, tokens, strict=True):
            self._prefilling.remove(sequence)
            self._running.append(sequence)
            sequence.accept(int(token))

    def _first_tokens(self, logits: object, ready: list[Sequence]) -> np.ndarray:
        device, model = self._device, self._model
        temperature, top_k, top_p, min_p, seeds, penalty = (
            device.staged(f"sample.{i}", c) for i, c in enumerate(sampling_columns(ready, len(ready)))
        )
        if any(s.settings.repetition_penalty != 1.0 for s in ready):
            seen = device.staged("sample.seen", seen_matrix(ready, len(ready), self._vocab))
            logits = model.repetition_penalty(logits, seen, penalty)
        positions = device.staged("sample.positions", np.array([len(s.prompt) - 1 for s in ready], "int32"))
        return device.download(model.sample(logits, temperature, top_k, top_p, min_p, seeds, positions))

    def _decode(self) -> None:
        if self._batch is None or self._rows != self._running:
            self._drain()
            self._retire()
            if not self._running:
                return
            self._load()
        batch = self._batch
        assert batch is not None
        while batch.in_flight < self._device.depth and self._budget > 0:
            batch.launch()
            self._budget -= 1
        self._accept(batch)

    def _load(self) -> None:
        size = min(b for b in self._model.decode if b >= len(self._running))
        if size not in self._batches:
            self._batches[size] = DecodeBatch(self._device, self._model, self._cache, size, self._vocab)
        self._batch = self._batches[size]
        self._rows = list(self._running)
        self._batch.load(self._rows)
        self._budget = min(s.remaining for s in self._rows)

    def _drain(self) -> None:
        while self._batch is not None and self._batch.in_flight:
            self._accept(self._batch)

    def _accept(self, batch: DecodeBatch) -> None:
        for sequence, token in zip(self._rows, batch.collect(), strict=False):
            sequence.accept(int(token))
