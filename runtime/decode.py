# SPDX-License-Identifier: Apache-2.0
"""One decode step for a bucket of rows, on the device from end to end, as a CUDA graph where there are graphs.

A step is: decode, repetition penalty, sample, mark the token as seen, advance. Its inputs and outputs are fixed device
buffers, so that a captured step can be replayed; the host only reads tokens back, some steps later. Steps that may be
in flight at the same time are graphs of their own: what one has sampled is read while the next one runs.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Any

import numpy as np

from gptq_compile.runtime import cuda
from gptq_compile.runtime.cache import SCRATCH_PAGE, PagedCache
from gptq_compile.runtime.device import CpuDevice
from gptq_compile.runtime.errors import ArtifactError
from gptq_compile.runtime.hosted import needs_host, through_host
from gptq_compile.runtime.sequence import Sequence
from gptq_compile.runtime.vm import Model

# The first steps of a bucket run directly: they load kernels and fill the VM's memory pool, which a capture had better
# not do. Two, because the VM keeps its last result until the next one, so the first leaves the pool one set short.
WARM_UP_STEPS = 2


class DecodeBatch:
    """Device state of one bucket size. Rows beyond the sequences write to the scratch page and are ignored."""

    def __init__(self, device: CpuDevice, model: Model, cache: PagedCache, size: int, vocab: int) -> None:
        self.size = size
        self._device, self._model, self._cache, self._vocab = device, model, cache, vocab
        rows = np.arange(size, dtype="int32")
        self._seq_of_token, self._logit_rows = device.tensor(rows), device.tensor(rows)
        self._input_ids, self._positions, self._slots = (device.zeros([size], "int32") for _ in range(3))
        self._page_table = device.zeros([size, cache.table_width], "int32")
        self._temperature, self._top_p, self._min_p = (device.zeros([size], "float32") for _ in range(3))
        self._top_k, self._seeds = (device.zeros([size], "int32") for _ in range(2))
        self._penalty = device.zeros([size], "float32")
        self._seen: Any = None  # [size, vocab] uint8, only once somebody asks for a penalty
        self._penalized = False
        self._hosted: Rows[Sequence] = ()  # the sequences, if some of them want their logits on the host
        self._ring = device.ring(device.depth, size)
        self._graphs: dict[tuple[bool, int], cuda.Graph | None] = {}  # with penalty or not, row of the ring
        self._direct_steps = {False: 0, True: 0}
        self._launched = self._collected = 0

    @property
    def depth(self) -> int:
        """Steps that may be in flight."""
        return 1 if self._hosted else self._device.depth

    @property
    def in_flight(self) -> int:
        """Steps launched whose tokens have not been read."""
        return self._launched - self._collected

    def load(self, sequences: Rows[Sequence]) -> None:
        """Makes the sequences' last tokens the next step's input; nothing may be in flight."""
        assert len(sequences) <= self.size
        device = self._device
        ids, positions = np.zeros(self.size, "int32"), np.zeros(self.size, "int32")
        table = np.full((self.size, self._cache.table_width), SCRATCH_PAGE, "int32")
        for i, sequence in enumerate(sequences):
            assert sequence.page_row is not None
            ids[i], positions[i] = sequence.tokens[-1], sequence.length - 1
            table[i] = sequence.page_row
        slots = self._cache.slots_of(table, positions)
        device.upload(self._input_ids, ids)
        device.upload(self._positions, positions)
        device.upload(self._slots, slots)
        device.upload(self._page_table, table)
        columns = sampling_columns(sequences, self.size)
        targets = (self._temperature, self._top_k, self._top_p, self._min_p, self._seeds, self._penalty)
        for tensor, column in zip(targets, columns, strict=True):
            device.upload(tensor, column)
        self._penalized = any(s.settings.repetition_penalty != 1.0 for s in sequences)
        if self._penalized:
            if self._seen is None:
                self._seen = device.zeros([self.size, self._vocab], "uint8")
            device.upload(self._seen, seen_matrix(sequences, self.size, self._vocab))
        self._hosted = list(sequences) if needs_host(sequences) else ()
        self._launched = self._collected = 0

    def launch(self) -> None:
        """Enqueues one step."""
        penalized, row = self._penalized, self._launched % self._device.depth
        graph = None
        if self._hosted or self._direct_steps[penalized] < WARM_UP_STEPS:
            outputs = self._run()
            if self._direct_steps[penalized] == 0:
                self._check_in_place(outputs)
            self._direct_steps[penalized] += not self._hosted
        else:
            key = (penalized, row)
            if key not in self._graphs:
                self._graphs[key] = self._device.capture(self._run)
                if self._graphs[key] is None:  # so those that are missing could not be captured either
                    for other in range(self._device.depth):
                        self._graphs.setdefault((penalized, other), None)
            graph = self._graphs[key]
            if graph is None:
                outputs = self._run()
            else:
                graph.launch(self._device.handle)
                outputs = graph.keep[0]
        # The sampled tokens, not the next input ids: a row whose logits are invalid has token -1 here and 0 there.
        self._ring.push(row, outputs[1].data_ptr(), self.size, reused=graph is None)
        self._launched += 1

    def collect(self) -> np.ndarray:
        """Waits for the oldest step in flight and returns its tokens, int32 [size]."""
        tokens = self._ring.wait(self._collected % self._device.depth, self.size)
        self._collected += 1
        return tokens

    def logits_of(self, token: int, position: int, page_row: np.ndarray) -> Any:
        """Runs only the decode entry on one token, in row 0; returns logits on the device, float32 [size, vocab]."""
        ids, positions = np.zeros(self.size, "int32"), np.zeros(self.size, "int32")
        table = np.full((self.size, self._cache.table_width), SCRATCH_PAGE, "int32")
        ids[0], positions[0], table[0] = token, position, page_row
        self._device.upload(self._input_ids, ids)
        self._device.upload(self._positions, positions)
        self._device.upload(self._slots, self._cache.slots_of(table, positions))
        self._device.upload(self._page_table, table)
        return self._decode()

    def abandon(self) -> None:
        """Forgets the steps in flight."""
        self._launched = self._collected = 0

    def close(self) -> None:
        """Destroys graphs and pinned memory; the device must be idle."""
        for graph in self._graphs.values():
            if graph is not None:
                graph.close()
        self._graphs = {}
        self._ring.close()

    def _decode(self) -> Any:
        return self._model.decode[self.size](
            self._input_ids, self._positions, self._seq_of_token, self._slots, self._page_table, self._logit_rows,
            self._cache.tensors, self._model.weights,
        )  # fmt: skip

    def _run(self) -> tuple[Any, ...]:
        model = self._model
        logits = self._decode()
        if self._hosted:
            logits = through_host(self._device, logits, self._hosted)
        if self._penalized:
            logits = model.repetition_penalty(logits, self._seen, self._penalty)
        tokens = model.sample(
            logits, self._temperature, self._top_k, self._top_p, self._min_p, self._seeds, self._positions
        )
        if self._penalized:
            model.mark_seen(self._seen, tokens)
        moved = model.advance(tokens, self._page_table, self._input_ids, self._positions, self._slots)
        return logits, tokens, moved

    def _check_in_place(self, outputs: tuple[Any, ...]) -> None:
        pointers = [t.data_ptr() for t in outputs[2]]
        if pointers != [t.data_ptr() for t in (self._input_ids, self._positions, self._slots)]:
            raise ArtifactError(
                "The artifact's entry 'advance' does not update its arguments in place, so decoding cannot work. "
                "Compile the model again."
            )


def sampling_columns(sequences: Rows[Sequence], size: int) -> tuple[np.ndarray, ...]:
    """(temperature, top_k, top_p, min_p, seeds, penalty) as arrays [size]; rows beyond are greedy."""
    filler = (0.0, 1, 1.0, 0.0, 0, 1.0)
    rows = [(*s.settings.device_row, s.settings.repetition_penalty) for s in sequences]
    rows += [filler] * (size - len(rows))
    types = ("float32", "int32", "float32", "float32", "int32", "float32")
    return tuple(np.array([row[i] for row in rows], dtype) for i, dtype in enumerate(types))


def seen_matrix(sequences: Rows[Sequence], size: int, vocab: int) -> np.ndarray:
    """uint8 [size, vocab]: 1 where the token occurs in the row's prompt or output."""
    seen = np.zeros((size, vocab), "uint8")
    for i, sequence in enumerate(sequences):
        seen[i, sequence.prompt] = 1
        seen[i, sequence.tokens] = 1
    return seen
