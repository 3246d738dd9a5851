# SPDX-License-Identifier: Apache-2.0
"""What solving one linear yields: codes, grids, and how good they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptq_compile.passes.gptq.grid import dequantize


@dataclass(frozen=True)
class SolveStats:
    """How a linear was solved and how well.

    Objectives are tr(E H E^T), E = W - dequantized W: twice the mean (token-weighted) squared output error, on the
    undamped H. Relative errors divide by tr(W H W^T). All are NaN when there was no usable Hessian.

    Attributes:
        method: "gptq" or "rtn": what the codes are.
        damp: Damping used, as a fraction of mean(diag(H)); 0 without a Hessian.
        reason: Why something other than plain GPTQ happened, as a sentence, or None.
        dead_columns: Columns whose calibration activation was always zero; they hold rounded weights on a grid
            fitted to the other columns.
        rtn_rows: Rows that kept round-to-nearest codes because GPTQ's were worse for them.
        objective: Of these codes.
        objective_rtn: Of round-to-nearest with the same settings (and dead columns, and clipping weights).
        relative_error: objective / tr(W H W^T).
        relative_error_rtn: objective_rtn / tr(W H W^T).
        seconds: Wall time, without factoring a Hessian that was given factored.
    """

    method: str
    damp: float
    reason: str | None
    dead_columns: int
    rtn_rows: int
    objective: float
    objective_rtn: float
    relative_error: float
    relative_error_rtn: float
    seconds: float


@dataclass(frozen=True)
class RowErrors:
    """f64[N] parts of the traces in `SolveStats`, one per weight row (in the Hessian's units)."""

    objective: Tensor
    objective_rtn: Tensor
    energy: Tensor
    from_rtn: Tensor

    def rows(self, part: slice) -> RowErrors:
        """The parts of some rows."""
        return RowErrors(self.objective[part], self.objective_rtn[part], self.energy[part], self.from_rtn[part])


@dataclass(frozen=True)
class Solution:
    """A quantized weight.

    Attributes:
        codes: u8[N, K], natural column order.
        scales: f32[N, G], float16 numbers.
        zeros: u8[N, G], or None for 2^(bits-1).
        g_idx: i32[K] group of each column, or None for k // group_size.
        bits: Bits of a code.
        group_size: Columns of a full group, -1 resolved to K.
        stats: How it was solved.
        row_errors: Per-row parts of the stats, or None without a Hessian.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    g_idx: Tensor | None
    bits: int
    group_size: int
    stats: SolveStats
    row_errors: RowErrors | None = None

    @property
    def weight(self) -> Tensor:
        """Dequantized weight f32[N, K]: the exact values the codes stand for."""
        return dequantize(self.codes, self.scales, self.zeros, self.g_idx, self.group_size, self.bits)

    def to(self, device: torch.device | str) -> Solution:
        """The same solution with its tensors elsewhere."""
        moved = {
            name: None if tensor is None else tensor.to(device)
            for name, tensor in (("codes", self.codes), ("scales", self.scales), ("zeros", self.zeros),
                                 ("g_idx", self.g_idx))
        }  # fmt: skip
        errors = self.row_errors
        if errors is not None:
            errors = RowErrors(*(t.to(device) for t in (errors.objective, errors.objective_rtn, errors.energy,
                                                        errors.from_rtn)))  # fmt: skip
        return replace(self, **moved, row_errors=errors)  # type: ignore[arg-type]

    def split(self, rows: Sequence[int]) -> list[Solution]:
        """Cut a stacked solution into its linears.

        Args:
            rows: Output features of each linear, in stacking order; they sum to N.

        Returns:
            One solution each, with its own stats (seconds shared by rows).
        """
        total = self.codes.shape[0]
        if sum(rows) != total:
            raise ValueError(f"The parts have {sum(rows)} rows, the stacked solution {total}.")
        parts, start = [], 0
        for count in rows:
            part = slice(start, start + count)
            start += count
            errors = None if self.row_errors is None else self.row_errors.rows(part)
            stats = replace(self.stats, seconds=self.stats.seconds * count / max(1, total))
            if errors is not None:
                stats = with_errors(stats, errors)
            parts.append(
                replace(
                    self,
                    codes=self.codes[part],
                    scales=self.scales[part],
                    zeros=None if self.zeros is None else self.zeros[part],
                    stats=stats,
                    row_errors=errors,
                )
            )
        return parts


def with_errors(stats: SolveStats, errors: RowErrors) -> SolveStats:
    """Stats with the traces, and the method, that per-row errors add up to."""
    objective, baseline, energy = (float(t.sum()) for t in (errors.objective, errors.objective_rtn, errors.energy))
    rtn_rows = int(errors.from_rtn.sum())
    ratio = 1 / energy if energy > 0 else float("nan")
    return replace(
        stats,
        method="rtn" if rtn_rows == errors.from_rtn.numel() else "gptq",
        rtn_rows=rtn_rows,
        objective=objective,
        objective_rtn=baseline,
        relative_error=objective * ratio,
        relative_error_rtn=baseline * ratio,
    )


def no_errors(method: str, reason: str | None, seconds: float, damp: float = 0.0, dead: int = 0) -> SolveStats:
    """Stats of a solution that was not measured on a Hessian."""
    nan = float("nan")
    return SolveStats(method, damp, reason, dead, 0, nan, nan, nan, nan, seconds)
