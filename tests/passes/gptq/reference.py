# SPDX-License-Identifier: Apache-2.0
"""GPTQ in float64 numpy, written from the paper (arXiv 2210.17323) to check the solver against.

Sections 3.1 and 3.2 with the inverse Hessian held explicitly: quantize one column, compensate the remaining ones
(equation 2), remove the column from the inverse by Gaussian elimination (equation 3). No Cholesky factor, no blocks,
no lazy updates. Grids are the reference quantizer's min-max grids with scales rounded up to float16.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Reference:
    """Codes and grids in natural column order; g_idx i64[K] is always given."""

    codes: NDArray[np.int64]
    scales: Array
    zeros: Array
    g_idx: NDArray[np.int64]

    @property
    def weight(self) -> Array:
        return self.scales[:, self.g_idx] * (self.codes - self.zeros[:, self.g_idx])


def fp16_up(value: float) -> float:
    """Smallest float16 >= value."""
    half = np.float16(value)
    if float(half) < value:
        half = np.nextafter(half, np.float16(np.inf))
    return float(half)


def minmax_grid(row: Array, bits: int, sym: bool) -> tuple[float, float]:
    """(scale, zero) of one row of one group."""
    low, high = min(row.min(), 0.0), max(row.max(), 0.0)
    if sym:
        high = max(-low, high)
        low = -high
    if low == 0 and high == 0:
        low, high = -1.0, 1.0
    scale = fp16_up((high - low) / (2**bits - 1))
    zero = 2.0 ** (bits - 1) if sym else float(np.clip(np.rint(-low / scale), 0, 2**bits - 1))
    return scale, zero


def grids(columns: Array, bits: int, sym: bool) -> tuple[Array, Array]:
    fitted = [minmax_grid(row, bits, sym) for row in columns]
    return np.array([f[0] for f in fitted]), np.array([f[1] for f in fitted])


def gptq(
    weight: Array,
    hessian: Array,
    bits: int,
    group_size: int,
    sym: bool = False,
    act_order: bool = False,
    static_groups: bool = False,
    damp: float = 0.01,
) -> Reference:
    """Quantize weight [N, K] under a Hessian [K, K] without dead columns."""
    n, k = weight.shape
    size = k if group_size == -1 else group_size
    count = -(-k // size)
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(k)
    scales, zeros = np.zeros((n, count)), np.zeros((n, count))
    g_idx = np.arange(k) // size
    if static_groups:
        for g in range(count):
            scales[:, g], zeros[:, g] = grids(weight[:, g * size : (g + 1) * size], bits, sym)
    else:
        g_idx = np.empty(k, dtype=np.int64)
        g_idx[order] = np.arange(k) // size

    w = weight.astype(np.float64).copy()
    h = hessian.astype(np.float64)
    inverse = np.linalg.inv(h + damp * np.mean(np.diag(h)) * np.eye(k))
    codes = np.zeros((n, k), dtype=np.int64)
    for position, column in enumerate(order):
        g = g_idx[column]
        if not static_groups and position % size == 0:
            scales[:, g], zeros[:, g] = grids(w[:, order[position : position + size]], bits, sym)
        code = np.clip(np.rint(w[:, column] / scales[:, g]) + zeros[:, g], 0, 2**bits - 1)
        codes[:, column] = code.astype(np.int64)
        error = w[:, column] - scales[:, g] * (code - zeros[:, g])
        pivot = inverse[column, column]
        rest = order[position + 1 :]
        w[:, rest] -= np.outer(error / pivot, inverse[column, rest])
        inverse = inverse - np.outer(inverse[:, column], inverse[column, :]) / pivot
    return Reference(codes, scales, zeros, g_idx)


def objective(weight: Array, quantized: Array, hessian: Array) -> float:
    """tr(E H E^T), E = weight - quantized."""
    error = weight.astype(np.float64) - quantized.astype(np.float64)
    return float(np.einsum("nk,kj,nj->", error, hessian.astype(np.float64), error))
