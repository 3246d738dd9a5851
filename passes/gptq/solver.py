# SPDX-License-Identifier: Apache-2.0
"""GPTQ for one weight matrix (paper algorithm 1), without any knowledge of the model around it."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from gptq_compile.errors import ConfigError
from gptq_compile.passes.gptq.columns import (
    BLOCK,
    PANEL,
    fused_range,
    panel_width,
    quantize_panel,
    subtract_product,
)
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.factor import Factor, factorize, no_factor
from gptq_compile.passes.gptq.grid import MAX_SCALE, MIN_SCALE, fit, fit_groups, zero_points
from gptq_compile.passes.gptq.hessian import Hessian
from gptq_compile.passes.gptq.phases import phase
from gptq_compile.passes.gptq.quadratic import row_quadratic
from gptq_compile.passes.gptq.rtn import check_weight, rtn
from gptq_compile.passes.gptq.solution import RowErrors, Solution, no_errors, with_errors
from gptq_compile.passes.gptq.threads import one_thread

SERIAL_WEIGHTS = 1 << 20  # weights up to which solving on a CPU does not gain from threads


@torch.no_grad()
def solve(
    weight: Tensor, hessian: Hessian | Factor | Tensor, config: QuantizeConfig, *, name: str = "linear"
) -> Solution:
    """Quantize a weight so that its output error under the Hessian is small.

    Args:
        weight: [N, K], any float type; linears that read the same activation may be stacked by rows (see
            `Solution.split`).
        hessian: An accumulator, a matrix f32 or f64 [K, K], or `prepare`'s result when several weights share it.
        config: Settings; with method "rtn" the Hessian is only used to measure.
        name: Module path, for messages.

    Returns:
        The solution; its stats say which rung of the ladder was used. It is never worse than round to nearest on the
        same Hessian: where it would be, round-to-nearest codes are kept and counted.

    Raises:
        ConfigError: The group is larger than the layer, or shapes do not match.
        ModelError: NaN or infinite weights.
        CalibrationError: The accumulator saw no tokens or overflowed.
    """
    with one_thread(weight.device.type == "cpu" and weight.numel() <= SERIAL_WEIGHTS):
        return _solve(weight, hessian, config, name)


def _solve(weight: Tensor, hessian: Hessian | Factor | Tensor, config: QuantizeConfig, name: str) -> Solution:
    start = time.perf_counter()
    k = weight.shape[1]
    config.validate_for_layer(k, name)
    factor = hessian if isinstance(hessian, Factor) else prepare(hessian, config)
    if factor.dead.shape[0] != k:
        raise ConfigError(f"{name} has {k} input features but its Hessian has {factor.dead.shape[0]}.")
    check_weight(weight, name)
    w = weight.float()
    dead = int(factor.dead.sum())
    if factor.hessian is None:
        stats = no_errors("rtn", f"{factor.reason}: rounded to nearest", 0.0, factor.damp, dead)
        return replace(rtn(w, config, name=name), stats=replace(stats, seconds=time.perf_counter() - start))

    # Grids of rounding: with a clipping search, weighted by the same Hessian, so that the comparison is fair.
    by_name = config.method == "rtn"
    with phase("grids", w.device):
        baseline = rtn(w, config, name=name) if by_name else _rounded(w, factor, config)
    with phase("errors", w.device):
        energy = row_quadratic(w, factor.hessian, factor.scale, rough=True)
        error_rtn = row_quadratic(w - baseline.weight, factor.hessian, factor.scale)
    if by_name or factor.upper is None:
        solution, errors = (
            baseline,
            RowErrors(error_rtn, error_rtn, energy, torch.ones_like(energy, dtype=torch.bool)),
        )
    else:
        with phase("update", w.device):
            solution = _column_loop(w, factor, config, baseline)
        with phase("errors", w.device):
            error = row_quadratic(w - solution.weight, factor.hessian, factor.scale)
        solution, errors = _keep_better(solution, error, baseline, error_rtn, energy)
    solution = finished(replace(solution, row_errors=errors), factor, config)
    return replace(solution, stats=replace(solution.stats, seconds=time.perf_counter() - start))


def finished(solution: Solution, factor: Factor, config: QuantizeConfig) -> Solution:
    """A solution with the stats that follow from its rows' errors and the factor it was made with."""
    errors = solution.row_errors
    if errors is None:
        return solution
    dead, count = int(factor.dead.sum()), int(errors.from_rtn.sum())
    notes = []
    if config.method != "rtn":
        notes.append(factor.reason if factor.upper is not None else f"{factor.reason}: rounded to nearest")
        if factor.upper is not None and count:
            notes.append(f"round to nearest was better and is kept in {count} of {errors.from_rtn.numel()} rows")
        if dead:
            notes.append(f"{dead} dead columns rounded to nearest")
    stats = no_errors("gptq", "; ".join(n for n in notes if n) or None, solution.stats.seconds, factor.damp, dead)
    return replace(solution, stats=with_errors(stats, errors))


def prepare(hessian: Hessian | Tensor, config: QuantizeConfig, *, consume: bool = False) -> Factor:
    """Factor a Hessian once for all linears that read the same activation.

    What is unusual about an accumulator's tokens becomes part of the factor's reason. An accumulator that had to drop
    every token gives no factor, so that its linears are rounded to nearest.

    Args:
        hessian: An accumulator, or a matrix f32 or f64 [K, K].
        config: Settings.
        consume: The Hessian is not needed any more, so that its memory may be used.

    Raises:
        CalibrationError: The accumulator was given no tokens or overflowed.
    """
    notes = hessian.notes() if isinstance(hessian, Hessian) else []
    if isinstance(hessian, Hessian):
        if hessian.dropped and not hessian.tokens:
            return no_factor(hessian.features, hessian.device, config.damp, notes[0])
        matrix, consume = (hessian.take() if consume else hessian.matrix()), True
    else:
        matrix = hessian
    few = matrix.device.type == "cpu" and matrix.numel() <= 2 * SERIAL_WEIGHTS
    with one_thread(few), phase("factorization", matrix.device):
        factor = factorize(matrix, config.damp, config.act_order, in_place=consume)
    if factor.reason:
        notes.append(factor.reason)
    return replace(factor, reason="; ".join(notes) or None)


def _keep_better(
    solution: Solution, error: Tensor, baseline: Solution, error_rtn: Tensor, energy: Tensor
) -> tuple[Solution, RowErrors]:
    """Keep round-to-nearest rows that beat GPTQ's (rows are independent problems)."""
    worse = ~(error <= error_rtn)  # also where the error is NaN
    if solution.g_idx is not None:
        # Groups follow the activation order, which the rows share: all or nothing.
        worse = torch.full_like(worse, not float(error.sum()) <= float(error_rtn.sum()))
    count = int(worse.sum())
    if count == 0:
        return solution, RowErrors(error, error_rtn, energy, worse)
    errors = RowErrors(torch.where(worse, error_rtn, error), error_rtn, energy, worse)
    if count == worse.numel():
        return baseline, errors
    pick = worse.unsqueeze(1)
    zeros = None
    if solution.zeros is not None and baseline.zeros is not None:
        zeros = torch.where(pick, baseline.zeros, solution.zeros)
    solution = replace(
        solution,
        codes=torch.where(pick, baseline.codes, solution.codes),
        scales=torch.where(pick, baseline.scales, solution.scales),
        zeros=zeros,
    )
    return solution, errors


def _rounded(w: Tensor, factor: Factor, config: QuantizeConfig) -> Solution:
    """Round to nearest in natural order, on grids that know which columns matter."""
    assert factor.hessian is not None
    size = config.group_for(w.shape[1])
    alive = _alive(factor)
    importance = factor.hessian.diagonal() if config.clips else None
    grid = fit_groups(_mask(w, alive, size), config.wbits, config.sym, size, config.clips, importance, config.min_zero)
    stats = no_errors("rtn", None, 0.0)
    return Solution(grid.quantize(w), grid.scales, grid.zeros, None, config.wbits, size, stats)


def _alive(factor: Factor) -> Tensor | None:
    return (~factor.dead).float() if bool(factor.dead.any()) else None


def _column_loop(w: Tensor, factor: Factor, config: QuantizeConfig, rounded: Solution) -> Solution:
    """Algorithm 1: w f32[N, K] in natural order -> solution without stats.

    Works on the transpose, so that a column's N weights are contiguous. Blocks and panels are cut such that whenever
    a group's grid is fitted, every column of the group carries all corrections of the columns before it. Static
    groups take the grids of `rounded`.
    """
    assert factor.upper is not None and factor.hessian is not None
    n, k = w.shape
    size, count = config.group_for(k), config.groups_in(k)
    order, upper = factor.order, factor.upper
    importance = factor.hessian.diagonal() if config.clips else None
    alive = _alive(factor)
    if config.static_groups:
        scales = rounded.scales.t().contiguous()
        zeros = zero_points(rounded.scales, rounded.zeros, config.wbits).t().contiguous()
    else:
        scales = torch.empty(count, n, device=w.device)
        zeros = torch.empty_like(scales)

    work = w.t().contiguous() if order is None else w.t()[order]
    if work.data_ptr() == w.data_ptr():
        work = work.clone()
    if order is not None:
        importance = None if importance is None else importance[order]
        alive = None if alive is None else alive[order]
    # Group of each processing position.
    groups = torch.arange(k, device=w.device) // size
    if config.static_groups and order is not None:
        groups = order // size
    codes = torch.empty(k, n, dtype=torch.uint8, device=w.device)
    # The fused loop reads the pivots itself; a list would make the host wait.
    inverse_pivots = [] if w.is_cuda and panel_width(w.device) > PANEL else upper.diagonal().reciprocal().tolist()
    # Longer products on a GPU: less of an update is reading and writing the weights.
    block = max(config.block_size, BLOCK) if w.is_cuda else config.block_size
    error = torch.empty(min(k, max(block, 1)), n, device=w.device)

    cut = None if config.static_groups else size
    panel = panel_width(w.device)
    for begin, end in _blocks(k, block, cut):
        for a, b in _panels(begin, end, cut, panel):
            if not config.static_groups and a % size == 0:
                _fit_group(work[a : min(a + size, k)], alive, importance, slice(a, a + size), scales, zeros, config)
            quantize_panel(
                work[a:b],
                upper[a:b, a:b],
                inverse_pivots[a:b],
                scales,
                zeros,
                groups[a:b],
                config.max_code,
                error[a - begin : b - begin],
                codes[a:b],
            )
            if b < end:
                work[b:end].addmm_(upper[a:b, b:end].t(), error[a - begin : b - begin], alpha=-1)
        if end < k:
            subtract_product(work[end:], upper[begin:end, end:], error[: end - begin])

    g_idx = None
    if order is not None:
        natural = torch.empty_like(codes)
        natural[order] = codes
        codes = natural
        if not config.static_groups and count > 1:
            g_idx = torch.empty(k, dtype=torch.int32, device=w.device)
            g_idx[order] = groups.int()
    return Solution(
        codes=codes.t().contiguous(),
        scales=scales.t().contiguous(),
        zeros=None if config.sym else zeros.t().to(torch.uint8).contiguous(),
        g_idx=g_idx,
        bits=config.wbits,
        group_size=size,
        stats=no_errors("gptq", None, 0.0),
    )


def _fit_group(
    work: Tensor,
    alive: Tensor | None,
    importance: Tensor | None,
    part: slice,
    scales: Tensor,
    zeros: Tensor,
    config: QuantizeConfig,
) -> None:
    """Fits the grid of the group whose columns are ``part``, in processing order.

    Args:
        work: f32[C, N] those columns with all corrections of the columns before them.
        alive: f32[K] or None, see `_mask`. `importance`: f32[K] or None, see `grid.fit`.
        scales: f32[G, N], of which the group's row is written. `zeros`: f32[G, N] likewise.
    """
    g = part.start // (part.stop - part.start)
    alive = None if alive is None else alive[part]
    if work.is_cuda and not config.clips and not config.min_zero and (fused := fused_range()) is not None:
        keep = None if alive is None else _kept(alive, len(work))
        fused(work, keep, scales[g], zeros[g], config.max_code, config.sym, (MIN_SCALE, MAX_SCALE))
        return
    group = _mask(work.t(), alive, part.stop - part.start)
    chosen = None if importance is None else importance[part].unsqueeze(0)
    s, z = fit(group.unsqueeze(1), config.wbits, config.sym, config.clips, chosen, config.min_zero)
    scales[g], zeros[g] = s.squeeze(1), z.squeeze(1)


def _mask(weight: Tensor, alive: Tensor | None, size: int) -> Tensor:
    """Weight [N, C] to fit grids on: dead columns count as 0, which every range holds anyway.

    A group without any live column keeps its weights, or it would get an arbitrary grid.
    """
    return weight if alive is None else weight * _kept(alive, size)


def _kept(alive: Tensor, size: int) -> Tensor:
    """`alive` with groups of `size` columns without any live one as if they were."""
    keep = alive.clone()
    for part in keep.split(size):
        if not bool(part.any()):
            part.fill_(1.0)
    return keep


def _blocks(k: int, block: int, size: int | None) -> list[tuple[int, int]]:
    """Column ranges between lazy updates: at most `block` wide, holding whole groups or lying inside one."""
    if size is None:
        return [(a, min(a + block, k)) for a in range(0, k, block)]
    if size <= block:
        block -= block % size
        return [(a, min(a + block, k)) for a in range(0, k, block)]
    return [
        (a, min(a + block, end))
        for start in range(0, k, size)
        for end in [min(start + size, k)]
        for a in range(start, end, block)
    ]


def _panels(begin: int, end: int, size: int | None, panel: int) -> list[tuple[int, int]]:
    """Ranges of at most `panel` columns inside a block; a group starts only at a range's start."""
    step = end - begin if size is None else min(size, end - begin)
    return [
        (a, min(a + panel, stop))
        for start in range(begin, end, step)
        for stop in [min(start + step, end)]
        for a in range(start, stop, panel)
    ]
