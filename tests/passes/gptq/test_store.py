# SPDX-License-Identifier: Apache-2.0
"""The form of solves on disk gives back exactly what went in."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch

from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.rtn import rtn
from gptq_compile.passes.gptq.solution import Solution
from gptq_compile.passes.gptq.solver import solve
from gptq_compile.passes.gptq.store import dump, load


def same(a: Solution, b: Solution) -> bool:
    for key in ("codes", "scales", "zeros", "g_idx"):
        x, y = getattr(a, key), getattr(b, key)
        if (x is None) != (y is None) or (x is not None and (x.dtype != y.dtype or not torch.equal(x, y))):
            return False
    stats = all(
        v == w or (isinstance(v, float) and math.isnan(v) and math.isnan(w))
        for v, w in zip(asdict(a.stats).values(), asdict(b.stats).values(), strict=True)
    )
    return stats and (a.bits, a.group_size) == (b.bits, b.group_size)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [False, True])
def test_stacked_solves_come_back_exactly(bits: int, sym: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight, x = (torch.randn(n, 37, generator=generator) for n in (12, 80))
    # Groups that follow the activation order: the linears share one g_idx.
    config = QuantizeConfig(wbits=bits, group_size=8, sym=sym, static_groups=False)
    parts = solve(weight, x.t() @ x, config).split([5, 1, 6])
    kept = {f"layer.{i}.weight": part for i, part in enumerate(parts)}
    content = dump(kept)
    found = load(content)
    assert list(found) == list(kept) and all(same(found[name], kept[name]) for name in kept)
    assert all(torch.equal(found[name].weight, kept[name].weight) for name in kept)
    raw = weight.numel()
    packed = {2: math.ceil(37 / 4) * 12, 3: math.ceil(37 / 2) * 12, 4: math.ceil(37 / 2) * 12, 8: raw}[bits]
    assert len(dump({"w": solve(weight, x.t() @ x, config)})) < packed + 12 * 5 * 5 + 37 * 4 + 1000


def test_a_solution_without_errors_comes_back(tmp_path: object) -> None:
    solution = rtn(torch.randn(3, 8), QuantizeConfig(group_size=-1, method="rtn"))
    assert same(load(dump({"w": solution}))["w"], solution)


@pytest.mark.parametrize("content", [b"", b"12345678", b"\x02\0\0\0\0\0\0\0{}"])
def test_something_else_is_refused(content: bytes) -> None:
    with pytest.raises((ValueError, KeyError)):
        load(content)
