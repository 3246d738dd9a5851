# SPDX-License-Identifier: Apache-2.0
"""Quantization that was interrupted at any solve goes on to the same codes, without solving anything twice."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

import gptq_compile.passes.gptq_quantize as module
from gptq_compile.passes.gptq.config import QuantizeConfig
from gptq_compile.passes.gptq.solution import Solution
from gptq_compile.passes.gptq.store import dump, load
from gptq_compile.passes.gptq_quantize import GptqQuantize
from gptq_compile.passes.program import Program
from tests import architectures


class Stopped(Exception):
    """The run was interrupted."""


class Store:
    """Keeps solves as bytes, and interrupts the run after some."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.kept: list[bytes] = []

    def finished(self, name: str) -> Solution | None:
        for content in self.kept:
            if name in (solutions := load(content)):
                return solutions[name]
        return None

    def keep(self, solutions: Mapping[str, Solution]) -> None:
        if self.limit is not None and len(self.kept) >= self.limit:
            raise Stopped
        self.kept.append(dump(solutions))


@pytest.fixture(scope="module")
def traced() -> Program:
    return architectures.traced("llama")


def quantize(traced: Program, store: Store | None, sequential: str) -> tuple[dict[str, torch.Tensor], list[dict]]:
    program = traced.clone()
    ids = torch.randint(0, 250, (3, 24), generator=torch.Generator().manual_seed(5))
    config = QuantizeConfig(group_size=32, sequential=sequential)
    GptqQuantize(config, ids, store=store).run(program)
    tensors = {name: program.params.get(name) for name in program.param_nodes}
    reports = [{k: v for k, v in r.items() if k != "seconds"} for r in program.attrs["quantization"]]
    return tensors, reports


@pytest.mark.parametrize("sequential", ["true", "block"])
def test_interrupted_at_any_solve_ends_with_the_same_codes(
    traced: Program, sequential: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, reports = quantize(traced, None, sequential)
    hessians: list[str] = []
    collect = module.Hessian

    def counted(*args: object, **kwargs: object) -> object:
        hessians.append(str(kwargs["name"]))
        return collect(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "Hessian", counted)
    solves = 8  # two layers of q/k/v, o, gate/up, down
    for limit in range(solves + 1):
        store = Store(limit)
        if limit < solves:
            with pytest.raises(Stopped):
                quantize(traced, store, sequential)
        else:
            quantize(traced, store, sequential)
        store.limit = None
        hessians.clear()
        got, got_reports = quantize(traced, store, sequential)
        assert got_reports == reports and got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)
        assert len(hessians) == solves - limit  # finished linears only run forward
        assert len(store.kept) == solves


def test_experts_go_on_too() -> None:
    program = architectures.traced("qwen3_moe")
    whole = Store()
    expected, reports = quantize(program, whole, "true")
    assert any("experts" in name for name in expected)
    for limit in (0, 2, 3, len(whole.kept)):
        store = Store()
        store.kept = whole.kept[:limit]
        got, got_reports = quantize(program, store, "true")
        assert got_reports == reports and len(store.kept) == len(whole.kept)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("sequential", ["true", "block"])
def test_a_lost_solve_in_the_middle_is_done_again(traced: Program, sequential: str) -> None:
    store = Store()
    expected, reports = quantize(traced, store, sequential)
    for lost in (0, 2, 5):
        damaged = Store()
        damaged.kept = [c for i, c in enumerate(store.kept) if i != lost]
        got, got_reports = quantize(traced, damaged, sequential)
        assert got_reports == reports
        assert all(torch.equal(got[name], expected[name]) for name in expected)
        assert damaged.kept[-1] != store.kept[-1] and len(damaged.kept) == len(store.kept)
