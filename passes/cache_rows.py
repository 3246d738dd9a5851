# SPDX-License-Identifier: Apache-2.0
"""Rows of the KV cache for the reference of ``paged_attention``: in floating point, or rounded to int8 with scales.

Shapes and sizes are those of `kernels/cache_format.py`; keys lie by row here, since no cache is ever read by both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_compile.kernels.cache_format import LARGEST, LEAST, SCALE_BYTES


def _parts(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Views of an int8 cache: codes ``[pages, heads, page_size, dim]`` and float32 scales ``[..., page_size]``."""
    size, dim = cache.shape[2], cache.shape[3] - SCALE_BYTES
    flat = cache.flatten(2)
    return flat[..., : size * dim].unflatten(-1, (size, dim)), flat[..., size * dim :].view(torch.float32)


def store_rows(cache: Tensor, page: Tensor, offset: Tensor, rows: Tensor) -> None:
    """Stores ``rows [n, heads, dim]`` at an offset of a page each, in place."""
    if cache.dtype != torch.int8:
        cache[page, :, offset] = rows.to(cache.dtype)
        return
    codes, scales = _parts(cache)
    rows = rows.float()
    largest = rows.abs().amax(-1)
    finite = rows.isfinite().all(-1)
    inverse = torch.where(finite & (largest > LEAST), LARGEST / largest, torch.zeros_like(largest))
    rounded = torch.where(finite[..., None], (rows * inverse[..., None]).round(), 0)
    codes[page, :, offset] = rounded.to(torch.int8)
    scales[page, :, offset] = torch.where(finite, largest / LARGEST, torch.full_like(largest, torch.nan))


def load_rows(cache: Tensor, pages: Tensor) -> Tensor:
    """The values of some pages one after another, ``[tokens, heads, dim]``."""
    if cache.dtype == torch.int8:
        codes, scales = _parts(cache)
        values = codes[pages].float() * scales[pages][..., None]
    else:
        values = cache[pages]
    return values.transpose(1, 2).flatten(0, 1)
