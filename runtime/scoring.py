# SPDX-License-Identifier: Apache-2.0
"""Teacher forcing: what the model predicts at every position of a given text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gptq_compile.runtime.cache import PagedCache
from gptq_compile.runtime.device import CpuDevice
from gptq_compile.runtime.prefill import Chunk, run_forward
from gptq_compile.runtime.vm import Model

_LOGITS_BYTES = 128 << 20  # most bytes of logits that one call makes on the device
_ROWS = 64  # whose logits are float64 at once


def predictions(
    device: CpuDevice, model: Model, cache: PagedCache, vocab: int, ids: np.ndarray, row: np.ndarray,
    done: int = 0, first: int = 0,
) -> Iterator[tuple[int, np.ndarray]]:  # fmt: skip
    """Computes a text in chunks, and yields the logits from some position on.

    Args:
        device: where ``model`` and ``cache`` are.
        model: the compiled model.
        cache: has room for ``ids`` in the pages of ``row``.
        vocab: columns of the logits.
        ids: token ids, int32 [n].
        row: a page table row.
        done: tokens that are in those pages already, at most ``first``.
        first: the first position whose logits are wanted.

    Yields:
        (i, logits float32 [rows, vocab]): predictions after ids[first + i] and those that follow, in order.
    """
    most = device.prefill_tokens
    wanted = max(1, min(most, _LOGITS_BYTES // (4 * vocab)))
    while done < len(ids):
        size = most if done + most <= first else wanted
        chunk = Chunk(cache)
        chunk.add(ids[done : done + size], done, row)
        skip = min(max(first - done, 0), chunk.tokens)
        chunk.want_from(skip)
        logits = run_forward(device, model, cache, chunk)
        if skip < chunk.tokens:
            yield done + skip - first, device.download(logits)
        done += chunk.tokens


def log_likelihood(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Log-probability of each token under its row of logits [rows, vocab], float64 [rows], in nats."""
    result = np.empty(len(tokens), "float64")
    for i in range(0, len(tokens), _ROWS):
        rows = logits[i : i + _ROWS].astype("float64")
        peak = rows.max(axis=1)
        total = np.log(np.exp(rows - peak[:, None]).sum(axis=1)) + peak
        result[i : i + _ROWS] = rows[np.arange(len(rows)), tokens[i : i + _ROWS]] - total
    return result
