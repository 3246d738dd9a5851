# SPDX-License-Identifier: Apache-2.0
"""Cholesky factor and inverse of a large matrix on a GPU, in its own memory and nearly all of it matrix products.

The libraries' routines reach a fraction of the rate of a matrix product there, and
each wants a copy of the matrix, which at 49,152 columns has 9.7 GB.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1024  # columns factored by the library at a time


def cholesky_(matrix: Tensor, block: int = _BLOCK) -> Tensor:
    """Overwrites the lower triangle of a symmetric matrix by L, L L^T = matrix; what is above it is garbage.

    Args:
        matrix: f32 or f64 [K, K], rows contiguous; only the lower triangle is read.
        block: Columns of a step.

    Returns:
        Nonzero int32 [] where some pivot was not positive (on the matrix's device, so that nobody has to wait).
    """
    k = matrix.shape[0]
    bad = torch.zeros((), dtype=torch.int32, device=matrix.device)
    for a in range(0, k, block):
        b = min(a + block, k)
        # Left-looking: one long product per block of columns instead of many short updates of everything to the right.
        if a:
            matrix[a:, a:b].addmm_(matrix[a:, :a], matrix[a:b, :a].t(), alpha=-1)
        lower, info = torch.linalg.cholesky_ex(matrix[a:b, a:b])
        bad |= info
        matrix[a:b, a:b] = lower
        if b < k:
            below = matrix[b:, a:b]
            below.copy_(torch.linalg.solve_triangular(lower.t(), below, upper=True, left=False))
    return bad


def invert_lower_(lower: Tensor, block: int = _BLOCK) -> Tensor:
    """Overwrites a lower triangular matrix [K, K] by its inverse and clears what is above the diagonal.

    Row block i of M = L^-1 is M_ii = L_ii^-1 and M_ij = -M_ii sum_{j <= l < i} L_il M_lj: products with the rows above,
    which are finished.
    """
    k = lower.shape[0]
    for a in range(0, k, block):
        b = min(a + block, k)
        identity = torch.eye(b - a, dtype=lower.dtype, device=lower.device)
        corner = torch.linalg.solve_triangular(lower[a:b, a:b], identity, upper=False)
        if a:
            row = torch.empty(b - a, a, dtype=lower.dtype, device=lower.device)
            for c in range(0, a, 2 * block):  # M is triangular: columns from c on need its rows from c on only
                d = min(c + 2 * block, a)
                torch.mm(lower[a:b, c:a], lower[c:a, c:d], out=row[:, c:d])
            torch.mm(corner, row, out=lower[a:b, :a]).neg_()
        lower[a:b, a:b] = corner
        lower[a:b, b:] = 0
    return lower
