# SPDX-License-Identifier: Apache-2.0
"""From a Hessian to the triangular factor the column loop reads, whatever state the Hessian is in.

The ladder, first rung that works: float32; float64 at the same damping; damping x10 up to MAX_DAMP; a diagonal
raised to row dominance, which is positive definite by Gershgorin's theorem; no factor, and the linear is rounded to
nearest. Every rung but the first leaves a reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_compile.passes.gptq.triangular import cholesky_, invert_lower_

MAX_DAMP = 1.0  # of mean(diag(H)); beyond it H is mostly the identity
LARGE = 2048  # columns from which a GPU inverts by `triangular` instead of the library
HUGE = 16384  # columns from which it also factors in place: the library is as fast, but copies the matrix


@dataclass(frozen=True)
class Factor:
    """A prepared Hessian; one serves every linear that reads the same activation.

    Attributes:
        hessian: f32[K, K] H / scale in natural column order, symmetric as given; None when H is not finite or zero.
        scale: mean(diag(H)) over the columns that are not dead. GPTQ does not depend on it; dividing by it keeps
            1e-30 and 1e30 inside float32.
        upper: f32[K, K] upper U with U^T U = (H + damp)^-1 in processing order, or None (round to nearest);
            rows are contiguous.
        order: i64[K] natural column at each processing position, or None for the natural order.
        dead: bool[K], natural order: columns whose activation is always zero.
        damp: Damping used, as a fraction of `scale`.
        reason: What is unusual about the Hessian or why this is not the first rung, or None.
    """

    hessian: Tensor | None
    scale: float
    upper: Tensor | None
    order: Tensor | None
    dead: Tensor
    damp: float
    reason: str | None


def no_factor(features: int, device: torch.device, damp: float, reason: str) -> Factor:
    """What stands for a Hessian that says nothing: its linears are rounded to nearest, for ``reason``."""
    return Factor(None, 1.0, None, None, torch.zeros(features, dtype=torch.bool, device=device), damp, reason)


@torch.no_grad()
def factorize(hessian: Tensor, damp: float = 0.01, act_order: bool = False, in_place: bool = False) -> Factor:
    """Prepare a Hessian for the column loop.

    Args:
        hessian: f32 or f64 [K, K].
        damp: Fraction of the mean diagonal added to the diagonal (paper section 3.3).
        act_order: Process columns by decreasing diagonal.
        in_place: The factor may keep (and scale) the matrix itself.

    Returns:
        The factor; `reason` and `damp` say what was needed.
    """
    k = hessian.shape[0]
    diag = hessian.diagonal().double()
    if not _finite(hessian):
        return no_factor(k, hessian.device, damp, "the Hessian is not finite")
    dead = diag <= 0
    if bool(dead.all()):
        return Factor(None, 1.0, None, None, dead, damp, "the Hessian is zero")
    scale = float(diag[~dead].mean())
    # The detour keeps 1 / scale finite; elsewhere it would only cost memory.
    if 1e-35 < scale < 1e35:
        h = torch.div(hessian, scale, out=hessian if in_place else None)
    else:
        h = (hessian.double() / scale).to(hessian.dtype)
    has_dead = bool(dead.any())
    work = h
    if has_dead:
        # A dead column must neither receive nor send corrections: identity row and column.
        work = h.masked_fill(dead.unsqueeze(0) | dead.unsqueeze(1), 0.0)
        work.diagonal().masked_fill_(dead, 1.0)
    order = None
    if act_order:
        order = torch.argsort(torch.where(dead, -1.0, diag), descending=True, stable=True)
    upper, used, reason = _ladder(work, damp, order)
    return Factor(h.float(), scale, upper, order if upper is not None else None, dead, used, reason)


def _finite(matrix: Tensor) -> bool:
    """Whether every element is finite; a few rows at a time, as the test makes temporaries."""
    step = max(1, (1 << 26) // max(1, matrix.shape[1]))
    return all(bool(torch.isfinite(rows).all()) for rows in matrix.split(step))


def _ordered(matrix: Tensor, order: Tensor) -> Tensor:
    """Rows and columns in another order; a few rows at a time, as indexing by pairs would make K^2 indices on a GPU."""
    result = torch.empty_like(matrix)
    step = max(1, (1 << 26) // max(1, matrix.shape[1]))
    for rows, into in zip(order.split(step), result.split(step), strict=True):
        torch.index_select(matrix.index_select(0, rows), 1, order, out=into)
    return result


def _ladder(h: Tensor, damp: float, order: Tensor | None) -> tuple[Tensor | None, float, str | None]:
    upper = _inverse_factor(h, damp, order)
    if upper is not None:
        return upper, damp, None
    h = h.double() if order is None else _ordered(h, order).double()
    upper = _inverse_factor(h, damp)
    if upper is not None:
        return upper, damp, "ill-conditioned: factored in float64"
    grown = damp
    while grown * 10 <= max(MAX_DAMP, damp) * (1 + 1e-9):
        grown *= 10
        upper = _inverse_factor(h, grown)
        if upper is not None:
            return upper, grown, f"not positive definite at damping {damp:g}: damping raised to {grown:g}"
    # Symmetrize: only then does row dominance bound the eigenvalues of what the factorization reads.
    floored = (h + h.t()) * 0.5
    radius = floored.abs().sum(1) - floored.diagonal().abs()
    diag = torch.maximum(floored.diagonal(), radius)
    floored.diagonal().copy_(diag)
    # Dominance alone allows a zero eigenvalue, so the damping is relative to what the diagonal has become.
    upper = _inverse_factor(floored, grown * float(diag.mean()))
    if upper is not None:
        return upper, grown, f"not positive definite at damping {grown:g}: diagonal raised to row dominance"
    return None, grown, "no positive definite Hessian could be made"


def _inverse_factor(h: Tensor, damp: float, order: Tensor | None = None) -> Tensor | None:
    """Upper U with U^T U = (h + damp I)^-1 as f32, or None where the arithmetic of h's type cannot be trusted.

    With an order i64[K], of h's rows and columns in that order.

    With J the reversal of rows or columns and J h J = L L^T, h^-1 = (J L^-1 J)^T (J L^-1 J), and J L^-1 J is upper:
    one Cholesky and one triangular inverse instead of Cholesky, inverse, Cholesky.
    """
    flipped = h.flip(0, 1) if order is None else _ordered(h, order.flip(0))
    flipped.diagonal().add_(damp)
    diag = flipped.diagonal().clone()
    if h.is_cuda and h.shape[0] > HUGE:
        info, lower = cholesky_(flipped), flipped
    else:
        lower, info = torch.linalg.cholesky_ex(flipped)
    del flipped
    pivots = lower.diagonal().square() / diag
    smallest = float(pivots.min())
    # A pivot at the rounding level of its diagonal is noise, though the factorization calls it positive.
    if int(info) != 0 or not math.isfinite(smallest) or smallest < 16 * torch.finfo(h.dtype).eps:
        return None
    if h.is_cuda and h.shape[0] > LARGE:
        lower = invert_lower_(lower.contiguous())
    else:
        identity = torch.eye(h.shape[0], dtype=h.dtype, device=h.device)
        lower = torch.linalg.solve_triangular(lower, identity, upper=False)
        del identity
    # LAPACK and cuSOLVER hand back columns; the column loop reads rows.
    upper = lower.flip(0, 1).float().contiguous()
    return upper if _finite(upper) else None
