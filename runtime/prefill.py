# SPDX-License-Identifier: Apache-2.0
"""Ragged prefill: one call of ``forward`` over tokens of one or several sequences."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from typing import Any

import numpy as np

from gptq_compile.runtime.cache import SCRATCH_PAGE, PagedCache
from gptq_compile.runtime.device import CpuDevice
from gptq_compile.runtime.vm import Model


class Chunk:
    """Tokens of one call, gathered sequence by sequence."""

    def __init__(self, cache: PagedCache) -> None:
        self._cache = cache
        self._ids: list[np.ndarray] = []
        self._positions: list[np.ndarray] = []
        self._sequences: list[np.ndarray] = []
        self._slots: list[np.ndarray] = []
        self._table: list[np.ndarray] = []
        self._logit_rows: list[int] = []
        self.tokens = 0

    def add(self, ids: Ids[int] | np.ndarray, first_position: int, page_row: np.ndarray) -> None:
        """Adds consecutive tokens of one sequence."""
        count = len(ids)
        positions = np.arange(first_position, first_position + count, dtype="int32")
        self._ids.append(np.asarray(ids, "int32"))
        self._positions.append(positions)
        self._sequences.append(np.full(count, len(self._table), "int32"))
        self._slots.append(self._cache.slots(page_row, positions))
        self._table.append(page_row)
        self.tokens += count

    def want_last(self) -> None:
        """Asks for the logits of the last token added."""
        self._logit_rows.append(self.tokens - 1)

    def want_from(self, first: int) -> None:
        """Asks for the logits of the ``first`` token of the call and of all after it."""
        self._logit_rows = list(range(first, self.tokens))

    def arrays(self, padded: int) -> list[np.ndarray]:
        """(input_ids, positions, seq_of_token, slots, page_table, logit_rows), padded to ``padded`` tokens.

        Padding tokens belong to a sequence of their own whose only page is the scratch page.
        """
        extra = padded - self.tokens
        fill = np.zeros(extra, "int32")
        table = np.vstack([*self._table, np.full(self._cache.table_width, SCRATCH_PAGE, "int32")])
        return [
            np.concatenate([*self._ids, fill]),
            np.concatenate([*self._positions, fill]),
            np.concatenate([*self._sequences, fill + len(self._table)]),
            np.concatenate([*self._slots, fill + SCRATCH_PAGE]),
            table,
            np.array(self._logit_rows or [0], "int32"),
        ]


def padded_length(tokens: int) -> int:
    """Rounds up so that few lengths occur: the VM's memory pool keeps buffers per size and would grow with each.

    Exact up to 8 tokens; then in steps of an eighth to a quarter of the length (9 -> 10, 100 -> 112, 500 -> 512).
    """
    step = max(1, 1 << max(0, (tokens - 1).bit_length() - 3))
    return -(-tokens // step) * step


def run_forward(device: CpuDevice, model: Model, cache: PagedCache, chunk: Chunk) -> Any:
    """Calls ``forward`` on a chunk.

    Returns:
        Logits on the device, float32 [wanted rows (at least 1), vocab].
    """
    arrays = chunk.arrays(padded_length(chunk.tokens))
    arguments = [device.staged(f"forward.{i}", a) for i, a in enumerate(arrays)]
    return model.forward(*arguments, cache.tensors, model.weights)
