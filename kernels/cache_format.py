# SPDX-License-Identifier: Apache-2.0
"""How keys and values lie in the pages of the KV cache.

A page holds `page_size` tokens of one head. In floating point its rows are the tokens, ``[page_size, dim]``; a format
with keys by column stores the keys as ``[dim, page_size]`` in the same memory, so that one vector has the same feature
of many keys and a score needs no sum over lanes.

In 8 bits a row is rounded to int8 with a scale of its own: value = code * scale, the largest magnitude being 127. The
page's codes come first, in the order above, then its `page_size` scales in float32, so a row takes four bytes more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CACHE_DTYPES = ("float32", "float16", "int8")
LARGEST = 127
"""Codes go from -127 to 127."""
LEAST = 1e-36
"""A row whose values are all smaller is zero: 127 divided by them would not be finite."""
SCALE_BYTES = 4


def row_width(dtype: str, dim: int) -> int:
    """Elements of the cache's type that a token of a head takes, its scale included."""
    return dim + SCALE_BYTES if dtype == "int8" else dim


@dataclass(frozen=True)
class CacheFormat:
    """A format of the cache.

    Attributes:
        dtype: one of `CACHE_DTYPES`.
        key_columns: whether a page's keys are stored by column.
    """

    dtype: str = "float32"
    key_columns: bool = False

    def join(self, codes: np.ndarray, scales: np.ndarray | None, keys: bool) -> np.ndarray:
        """How rows lie in memory.

        Args:
            codes: ``[pages, heads, page_size, dim]`` in the format's type.
            scales: float32 ``[pages, heads, page_size]`` for int8.
            keys: whether these are keys.

        Returns:
            ``[pages, heads, page_size, row_width]``.
        """
        shape = (*codes.shape[:-1], row_width(self.dtype, codes.shape[-1]))
        if keys and self.key_columns:
            codes = codes.swapaxes(-1, -2)
        flat = np.ascontiguousarray(codes, self.dtype).reshape(*shape[:2], -1)
        if scales is not None:
            flat = np.concatenate([flat, np.ascontiguousarray(scales, np.float32).view(np.int8)], -1)
        return flat.reshape(shape)

    def split(self, cache: np.ndarray, keys: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Codes and scales of a cache: the inverse of `join`."""
        pages, heads, size, width = cache.shape
        dim = width - row_width(self.dtype, 0)
        flat = np.ascontiguousarray(cache).reshape(pages, heads, -1)
        codes = flat[..., : size * dim]
        if keys and self.key_columns:
            codes = codes.reshape(pages, heads, dim, size).swapaxes(-1, -2)
        scales = np.ascontiguousarray(flat[..., size * dim :]).view(np.float32) if self.dtype == "int8" else None
        return codes.reshape(pages, heads, size, dim), scales

    def encode(self, rows: np.ndarray, keys: bool) -> np.ndarray:
        """A cache of values ``[pages, heads, page_size, dim]``."""
        codes, scales = rounded(rows) if self.dtype == "int8" else (rows, None)
        return self.join(codes, scales, keys)

    def decode(self, cache: np.ndarray, keys: bool) -> np.ndarray:
        """The values of a cache, ``[pages, heads, page_size, dim]``: in its own type, or in float32 for int8."""
        codes, scales = self.split(cache, keys)
        return codes if scales is None else codes.astype(np.float32) * scales[..., None]


def rounded(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows ``[..., dim]`` as int8 codes and float32 scales ``[...]``; a row that is not finite has scale NaN."""
    rows = rows.astype(np.float32)
    largest = np.abs(rows).max(-1)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        finite = np.isfinite(rows).all(-1)
        inverse = np.where(finite & (largest > LEAST), np.float32(LARGEST) / largest, np.float32(0))
        codes = np.where(finite[..., None], np.rint(rows * inverse[..., None]), 0).astype(np.int8)
        scales = np.where(finite, largest * np.float32(1 / LARGEST), np.float32(np.nan)).astype(np.float32)
    return codes, scales
