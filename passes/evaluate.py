# SPDX-License-Identifier: Apache-2.0
"""Runs a program on one sequence whatever its form: before or after the KV cache was inserted."""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_compile.passes.program import Program

PAGE_SIZE = 16


def evaluate(program: Program, ids: Tensor, *, step: bool = False, device: str = "cpu") -> Tensor:
    """Reference logits of every position of one sequence.

    Args:
        program: in sequence form (as traced) or paged form (after ``insert_kv_cache``).
        ids: ``[n]`` int64 token ids.
        step: in paged form, feed one token at a time (as decoding does) instead of all at once.

    Returns:
        float32 ``[n, vocab]``.
    """
    n = ids.numel()
    ids = ids.reshape(1, n).to(device)
    positions = torch.arange(n, device=device).reshape(1, n)
    names = [node.name for node in program.inputs]
    if "page_table" not in names:
        return program.run(ids, positions, torch.arange(n, device=device), device=device)[0].float()
    pages = (n + PAGE_SIZE - 1) // PAGE_SIZE + 1
    # Pages in reverse order, so that a mistake in the indirection shows.
    table = torch.arange(pages - 1, -1, -1, device=device, dtype=torch.int32).reshape(1, pages)
    caches = []
    for node in program.inputs[names.index("page_table") + 1 :]:
        val = node.meta["val"]
        caches.append(torch.zeros((pages, *map(int, val.shape[1:])), dtype=val.dtype, device=device))
    chunks = [[i] for i in range(n)] if step else [list(range(n))]
    rows = []
    for chunk in chunks:
        index = torch.tensor(chunk, device=device)
        slots = (table[0, index // PAGE_SIZE] * PAGE_SIZE + index % PAGE_SIZE).to(torch.int32)
        rows.append(
            program.run(
                ids[:, index], positions[:, index], torch.arange(len(chunk), device=device),
                torch.zeros(len(chunk), dtype=torch.int32, device=device), slots, table, *caches, device=device,
            )[0].float()
        )  # fmt: skip
    return torch.cat(rows)
