# SPDX-License-Identifier: Apache-2.0
"""The multiple-choice knapsack: one choice per item, smallest total cost within a size.

Solved in three steps (Dyer, 1984; Pisinger, 1995): the linear relaxation, whose optimal multiplier gives a lower bound
and a feasible start; removal of every choice that no better solution can contain; exact dynamic programming over the
undominated (size, cost) pairs of what is left.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptq_compile.errors import ConfigError

MAX_STATES = 200_000  # undominated pairs kept at once; beyond it the search is cut and the gap says by how much at most


@dataclass(frozen=True)
class Choice:
    """One way to treat an item: its size (any unit, not negative) and its cost."""

    size: float
    cost: float


@dataclass(frozen=True)
class Allocation:
    """A solved knapsack.

    Attributes:
        picks: the chosen index of every item.
        size: their total size. ``cost``: their total cost.
        bound: no allocation within the budget costs less; equal to ``cost`` when it is optimal.
    """

    picks: tuple[int, ...]
    size: float
    cost: float
    bound: float


def allocate(items: Sequence[Sequence[Choice]], budget: float) -> Allocation:
    """Chooses one choice per item so that the sizes fit the budget at the smallest total cost.

    Args:
        items: at least one choice each.
        budget: largest total size.

    Raises:
        ConfigError: even the smallest choices exceed the budget, or an item has no choices.
    """
    if not all(items):
        raise ConfigError("An item without choices cannot be allocated.")
    sizes = [np.array([c.size for c in item], dtype=np.float64) for item in items]
    costs = [np.array([c.cost for c in item], dtype=np.float64) for item in items]
    smallest = sum(float(s.min()) for s in sizes)
    if smallest > budget:
        raise ConfigError(f"The budget is {budget:.6g}, but even the smallest choices take {smallest:.6g}.")
    picks, price = _relaxed(sizes, costs, budget)
    best = _total(costs, picks)
    # With the multiplier's price, every choice has a reduced cost >= 0 against its item's best one.
    reduced = [c + price * s for c, s in zip(costs, sizes, strict=True)]
    lowest = [float(r.min()) for r in reduced]
    bound = sum(lowest) - price * budget
    gap = best - bound
    if gap > 1e-12 * max(1.0, abs(best)):
        reduced = [r - low for r, low in zip(reduced, lowest, strict=True)]
        better, exact = _search(sizes, reduced, budget, price, gap)
        if better is not None and _total(costs, better) < best:
            picks, best = better, _total(costs, better)
        bound = best if exact else min(best, bound)
    return Allocation(tuple(picks), _total(sizes, picks), best, min(bound, best))


def _total(values: Sequence[NDArray[np.float64]], picks: Sequence[int]) -> float:
    return float(sum(v[i] for v, i in zip(values, picks, strict=True)))


def _hull(size: NDArray[np.float64], cost: NDArray[np.float64]) -> list[int]:
    """Indices of the lower convex hull of (size, cost), by size; costs fall along it."""
    hull: list[int] = []
    for i in np.lexsort((cost, size)):
        if hull and cost[i] >= cost[hull[-1]]:
            continue
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            if (cost[a] - cost[b]) * (size[i] - size[b]) > (cost[b] - cost[i]) * (size[b] - size[a]):
                break
            hull.pop()
        hull.append(int(i))
    return hull


def _relaxed(
    sizes: Sequence[NDArray[np.float64]], costs: Sequence[NDArray[np.float64]], budget: float
) -> tuple[list[int], float]:
    """Greedy along the hulls, steepest step first: a feasible solution and the relaxation's multiplier."""
    hulls = [_hull(s, c) for s, c in zip(sizes, costs, strict=True)]
    picks = [h[0] for h in hulls]
    left = budget - _total(sizes, picks)
    steps = []
    for item, hull in enumerate(hulls):
        for a, b in itertools.pairwise(hull):
            growth = float(sizes[item][b] - sizes[item][a])
            steps.append((float(costs[item][a] - costs[item][b]) / growth, item, a, b, growth))
    steps.sort(key=lambda step: -step[0])  # stable, and slopes fall along a hull, so steps of an item stay in order
    price = 0.0
    for slope, item, a, b, growth in steps:
        if growth <= left and picks[item] == a:
            picks[item] = b
            left -= growth
        elif price == 0.0:
            price = slope  # the first step that does not fit is the one that the relaxation splits
    return picks, price


def _search(
    sizes: Sequence[NDArray[np.float64]],
    reduced: Sequence[NDArray[np.float64]],
    budget: float,
    price: float,
    gap: float,
) -> tuple[list[int] | None, bool]:
    """Solutions whose reduced costs plus unused budget at its price stay within the gap: the best one, and whether all
    were looked at."""
    slack = gap * (1 + 1e-9)
    kept = [np.flatnonzero(r <= slack) for r in reduced]
    open_items = [i for i, k in enumerate(kept) if len(k) > 1]
    fixed = [i for i, k in enumerate(kept) if len(k) == 1]
    used = float(sum(sizes[i][kept[i][0]] for i in fixed))
    spent = float(sum(reduced[i][kept[i][0]] for i in fixed))
    rest = [float(sizes[i][kept[i]].min()) for i in open_items]
    after = np.cumsum([0.0, *rest[::-1]])[::-1]  # smallest size of the items from here on
    room = np.array([used])
    cost = np.array([spent])
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    exact = True
    for position, item in enumerate(open_items):
        choice = kept[item]
        size = (room[:, None] + sizes[item][choice]).ravel()
        total = (cost[:, None] + reduced[item][choice]).ravel()
        parent = np.repeat(np.arange(len(room)), len(choice))
        pick = np.tile(choice, len(room))
        good = (size + after[position + 1] <= budget * (1 + 1e-12)) & (total <= slack)
        # The total cost is the bound + reduced costs + price * unused budget; in `cost` units: reduced - price * size.
        order = np.flatnonzero(good)
        order = order[np.lexsort((total[order] - price * size[order], size[order]))]
        value = total[order] - price * size[order]
        front = np.minimum.accumulate(value)
        keep = np.ones(len(order), dtype=bool)
        keep[1:] = value[1:] < front[:-1]
        order = order[keep]
        if len(order) > MAX_STATES:
            exact = False
            order = np.sort(order[np.argsort(total[order], kind="stable")[:MAX_STATES]])
        if not len(order):
            return None, exact
        room, cost = size[order], total[order]
        trail.append((parent[order], pick[order]))
    end = int(np.argmin(cost - price * room))
    picks = [int(k[0]) for k in kept]
    for item, (parents, chosen) in zip(reversed(open_items), reversed(trail), strict=True):
        picks[item] = int(chosen[end])
        end = int(parents[end])
    return picks, exact
