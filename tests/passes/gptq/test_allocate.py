# SPDX-License-Identifier: Apache-2.0
"""The knapsack against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_compile.errors import ConfigError
from gptq_compile.passes.gptq import allocate as module
from gptq_compile.passes.gptq.allocate import Choice, allocate

choices = st.lists(
    st.builds(Choice, st.integers(0, 30).map(float), st.floats(0, 100, allow_subnormal=False)), min_size=1, max_size=4
)


def brute_force(items: list[list[Choice]], budget: float) -> float | None:
    feasible = [
        sum(c.cost for c in picked) for picked in itertools.product(*items) if sum(c.size for c in picked) <= budget
    ]
    return min(feasible, default=None)


@given(st.lists(choices, min_size=1, max_size=6), st.integers(0, 120).map(float))
@settings(max_examples=400, deadline=None)
def test_equals_brute_force(items: list[list[Choice]], budget: float) -> None:
    want = brute_force(items, budget)
    if want is None:
        with pytest.raises(ConfigError, match="even the smallest choices take"):
            allocate(items, budget)
        return
    got = allocate(items, budget)
    assert got.cost == pytest.approx(want, rel=1e-9, abs=1e-9)
    assert got.bound == pytest.approx(got.cost)
    assert got.size <= budget
    assert got.size == sum(item[p].size for item, p in zip(items, got.picks, strict=True))
    assert got.cost == pytest.approx(sum(item[p].cost for item, p in zip(items, got.picks, strict=True)))


def model_like(count: int, seed: int) -> list[list[Choice]]:
    """Linears of a few shapes with costs that fall about fourfold a bit."""
    rng = np.random.default_rng(seed)
    items = []
    for _ in range(count):
        weights = int(rng.choice([576 * 576, 576 * 192, 576 * 1536]))
        level = 10 ** rng.uniform(-4, 0)
        items.append(
            [
                Choice(weights * (bits + 24 / group), level * 4.0**-bits * (group / 128) ** 0.3 * rng.uniform(0.8, 1.2))
                for bits in (2, 3, 4, 8)
                for group in (32, 64, 128)
            ]
        )
    return items


def test_three_hundred_linears_are_solved_exactly() -> None:
    items = model_like(300, 1)
    weights = sum(item[2].size / (2 + 24 / 128) for item in items)
    for average in (2.3, 3.5, 4.25, 7.0):
        got = allocate(items, average * weights)
        assert got.size <= average * weights
        assert got.bound == got.cost


def test_a_cut_search_says_how_far_it_may_be_off(monkeypatch: pytest.MonkeyPatch) -> None:
    items = model_like(40, 2)
    budget = 3.3 * sum(item[2].size / (2 + 24 / 128) for item in items)
    optimum = allocate(items, budget).cost
    monkeypatch.setattr(module, "MAX_STATES", 3)
    got = allocate(items, budget)
    assert got.bound <= optimum * (1 + 1e-12) <= got.cost * (1 + 2e-12)
    assert got.size <= budget


def test_more_budget_never_costs_more() -> None:
    items = model_like(25, 3)
    weights = sum(item[2].size / (2 + 24 / 128) for item in items)
    costs = [allocate(items, average * weights).cost for average in np.linspace(2.2, 8.5, 15)]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(costs))


def test_an_item_without_choices_is_refused() -> None:
    with pytest.raises(ConfigError, match="without choices"):
        allocate([[Choice(1.0, 1.0)], []], 10)
