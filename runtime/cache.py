# SPDX-License-Identifier: Apache-2.0
"""The paged KV cache: which page belongs to which sequence (PagedAttention, Kwon et al. 2023, section 4.2).

Page 0 is the scratch page: rows that only fill up a batch write there, so they never touch a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from typing import Any

import numpy as np

from gptq_compile.runtime.device import CpuDevice
from gptq_compile.runtime.errors import ContextError
from gptq_compile.runtime.manifest import Manifest
from gptq_compile.runtime.pages import PagePool
from gptq_compile.runtime.vm import as_tuple

SCRATCH_PAGE = 0
CPU_BUDGET_BYTES = 1 << 30
CUDA_BUDGET_SHARE = 0.6  # of the memory that is free after the weights


def default_tokens(manifest: Manifest, device: CpuDevice, max_batch: int) -> int:
    """Cache capacity in tokens: every sequence of the batch at full context, if the byte budget allows it."""
    free = device.free_bytes()
    budget = CPU_BUDGET_BYTES if free is None else int(free * CUDA_BUDGET_SHARE)
    affordable = max(budget // max(manifest.cache_bytes_per_token, 1), manifest.page_size)
    return min(manifest.context_length * max_batch, affordable)


class PagedCache:
    """Cache tensors of every layer, and which of their pages belong to which sequence.

    Attributes:
        tensors: tuple (k0, v0, k1, v1, ...), each [pages, kv_heads, page_size, head_dim]; in int8 rows
            have four elements more.
        capacity: tokens that sequences can hold together.
        max_sequence: tokens that one sequence can hold.
        pages: how many there are, the scratch page left out.
        table_width: pages of the longest sequence, the second dimension of every page table.
    """

    def __init__(self, manifest: Manifest, device: CpuDevice, tokens: int) -> None:
        self.page_size = manifest.page_size
        pages = max(1, -(-tokens // self.page_size))
        self.capacity = pages * self.page_size
        self.max_sequence = min(manifest.context_length, self.capacity)
        self.context_length = manifest.context_length
        self.table_width = self.pages_for(self.max_sequence)
        arrays = []
        for layer in manifest.cache_layers:
            for width in manifest.cache_widths(layer):
                shape = (pages + 1, layer.kv_heads, self.page_size, width)
                # Zeros, not garbage: a kernel may read a whole page and multiply what lies ahead by zero.
                arrays.append(device.zeros(shape, manifest.cache_dtype))
        self.tensors: Any = as_tuple(arrays)
        self.pages = pages
        self._pool = PagePool(pages, self.page_size)

    def pages_for(self, tokens: int) -> int:
        """Pages that ``tokens`` tokens need."""
        return -(-tokens // self.page_size)

    @property
    def free_pages(self) -> int:
        """Pages that no sequence has; some may still hold text that can be found."""
        return self._pool.available

    @property
    def kept_pages(self) -> int:
        """Pages that no sequence has and whose text can be found."""
        return self._pool.kept

    def allocate(self, tokens: int) -> np.ndarray:
        """Takes pages for ``tokens`` tokens.

        Returns:
            A page table row, int32 [table_width]; unused entries are the scratch page.

        Raises:
            ContextError: if there are not enough free pages.
        """
        need = self.pages_for(tokens)
        if need > self.free_pages or need > self.table_width:
            raise ContextError(
                f"The KV cache has {self.free_pages * self.page_size} free tokens of {self.capacity}, and a sequence "
                f"needs {tokens}. Load the engine with a larger cache_tokens."
            )
        return self._row(self._pool.take(need))

    def known(self, ids: Ids[int] | np.ndarray) -> int:
        """Tokens at the beginning of ``ids`` that are in the cache."""
        return len(self._pool.find(ids)) * self.page_size

    def admit(self, ids: Ids[int] | np.ndarray, tokens: int) -> tuple[np.ndarray, int] | None:
        """Takes pages for a sequence that begins with ``ids``, sharing those that hold its beginning already.

        Args:
            ids: what is known of the sequence and may be shared.
            tokens: room to make for it.

        Returns:
            A page table row and the number of tokens that are in it; None if there are not enough pages now.
        """
        shared = self._pool.find(ids)
        need = self.pages_for(tokens) - len(shared)
        if need > self._pool.available - self._pool.unheld(shared):
            return None
        self._pool.share(shared)
        return self._row([*shared, *self._pool.take(need)]), len(shared) * self.page_size

    def room(self, row: np.ndarray) -> int:
        """Tokens that a row's pages hold."""
        return int(np.count_nonzero(row)) * self.page_size

    def extend(self, row: np.ndarray, tokens: int) -> bool:
        """Adds pages to a row until it holds ``tokens``, or as many as there are; False if there is not one."""
        have = int(np.count_nonzero(row))
        add = min(self.pages_for(tokens) - have, self.free_pages)
        row[have : have + max(add, 0)] = self._pool.take(max(add, 0))
        return add > 0

    def record(self, row: np.ndarray, ids: Ids[int] | np.ndarray) -> None:
        """Says that a row holds ``ids``, so that other sequences with this beginning can share its full pages."""
        self._pool.record(ids, row.tolist())

    def release(self, row: np.ndarray) -> None:
        """Gives a row's pages back."""
        self._pool.release([int(p) for p in row if p != SCRATCH_PAGE])

    def forget(self) -> None:
        """Drops text that no sequence holds."""
        self._pool.forget()

    def slots(self, row: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Slot of each position: page * page_size + offset, int32."""
        return (row[positions // self.page_size] * self.page_size + positions % self.page_size).astype("int32")

    def slots_of(self, table: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Slot of one position per table row, int32 [rows]."""
        pages = table[np.arange(len(table)), positions // self.page_size]
        return (pages * self.page_size + positions % self.page_size).astype("int32")

    def _row(self, pages: list[int]) -> np.ndarray:
        row = np.full(self.table_width, SCRATCH_PAGE, "int32")
        row[: len(pages)] = pages
        return row
