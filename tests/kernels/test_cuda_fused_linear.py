# SPDX-License-Identifier: Apache-2.0
"""Quantized linears that make their activations and add a residual: the generated source, run by an emulator."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))

import cases_fused
import cuda_emulator
from cases import Arguments, BuiltFor

from gptq_compile.errors import NoKernelError
from gptq_compile.kernels.cuda import (
    resident,
    resident_linear,
    stationary,
    stationary_linear,
    stream,
    tile_linear,
    wgmma_choice,
    wgmma_linear,
)
from gptq_compile.kernels.registry import Case, select
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.words import Grouping
from tests.kernels.op_runner import needs_gxx

HOPPER = Target.parse("cuda:sm_90")
OLDER = Target.parse("cuda:sm_80,sm_90")
ALONE = Target.parse("cuda:sm_90a")  # packs weights in another order
SEVERAL = [c for c in cases_fused.several_rows(True) if c.case["in_features"] * c.case["out_features"] < 90000]
SMALL = [
    c for c in cases_fused.made_inputs() if c.case["in_features"] * c.case["out_features"] * (c.case.rows or 1) < 60000
]

GATES = [c for c in cases_fused.gated_results() if c.case["in_features"] * c.case["out_features"] < 60000]


def _run(func: Any, target: Target, before: Arguments, rows: int, folder: Path) -> Arguments:
    """The arguments after the emulated call."""
    after = [a.copy() for a in before]
    names = [p.name.removesuffix("_ptr") for p in func.params]
    cuda_emulator.run(func, target, dict(zip(names, after, strict=True)), rows, folder)
    return after


@needs_gxx
@pytest.mark.parametrize("check", SMALL, ids=[c.name for c in SMALL])
def test_fused_linear_matches_float64(
    check: cases_fused.KernelCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = OLDER if check.case.rows == 3 else ALONE if check.case["has_bias"] else HOPPER
    monkeypatch.setattr(BuiltFor, "target", target)
    kernel = select(check.case, target).kernel
    func = kernel.prim_func(check.case, target)
    before = check.make_inputs(np.random.default_rng(0))
    passed, said = check.check(before, _run(func, target, before, check.case.rows or 0, tmp_path))
    assert passed, said


@needs_gxx
@pytest.mark.parametrize("check", GATES, ids=[c.name for c in GATES])
def test_gated_results_match_float64(
    check: cases_fused.KernelCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = ALONE if check.case["has_zeros"] else HOPPER
    monkeypatch.setattr(BuiltFor, "target", target)
    monkeypatch.setattr(stream, "BLOCKS", 2)  # so that a block takes several tiles at once and in turn
    kernel = select(check.case, target).kernel
    assert kernel.name == "cuda.fused_linear.stream"
    func = kernel.prim_func(check.case, target)
    before = check.make_inputs(np.random.default_rng(0))
    passed, said = check.check(before, _run(func, target, before, check.case.rows or 0, tmp_path))
    assert passed, said


@needs_gxx
@pytest.mark.parametrize("check", SEVERAL, ids=[c.name for c in SEVERAL])
def test_several_rows_match_float64(
    check: cases_fused.KernelCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = int(check.name.rsplit("_m", 1)[1])
    target = HOPPER if rows % 2 and rows <= 16 else ALONE
    monkeypatch.setattr(BuiltFor, "target", target)
    # Fewer blocks than there are tiles, so that each of them takes several.
    monkeypatch.setattr(stream, "BLOCKS", 3)
    kernel = select(check.case, target).kernel
    assert kernel.name == f"cuda.fused_linear.{'wgmma' if check.case.rows is None else 'stationary'}"
    if check.case.rows is None:  # one of its kernels
        plan = [(None, wgmma_choice.best(tile_linear.shape_of(check.case), rows))]
        func = wgmma_linear.build(check.case, target, plan)
    else:
        func = kernel.prim_func(check.case, target)
    before = check.make_inputs(np.random.default_rng(0))
    passed, said = check.check(before, _run(func, target, before, rows, tmp_path))
    assert passed, said


@needs_gxx
@pytest.mark.parametrize(
    ("config", "act"),
    [(stationary.Config(4, 1, 4, 3, True), "silu"), (stationary.Config(2, 2, 3, 2, True), "")],
)
def test_barriers_passed_a_tile_later_match_float64(
    config: stationary.Config, act: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BuiltFor, "target", ALONE)
    monkeypatch.setattr(stream, "BLOCKS", 2)
    check = cases_fused._case("later", 4, 128, 512, 224, 13, {"out_act": act} if act else {}, True, residual=not act)
    func = stationary_linear.build(check.case, ALONE, config)
    before = check.make_inputs(np.random.default_rng(0))
    passed, said = check.check(before, _run(func, ALONE, before, 13, tmp_path))
    assert passed, said


# bits, group, K, N, rows; odd N, K that ends within a chunk of codes or leaves blocks without units, one and several
# turns, one and several warps of a tile, groups of 32 to 256 and one a row.
RESIDENT = [
    ((4, 128, 768, 90, 16), resident.Config(3, 2, 1, 2, 2), "", HOPPER),
    ((4, 128, 776, 90, 13), resident.Config(1, 2, 2, 2, 3), "", ALONE),
    ((4, 128, 1032, 90, 16), resident.Config(3, 1, 2, 2, 3, 2), "", ALONE),
    ((4, 64, 968, 128, 8), resident.Config(2, 1, 2, 2, 2), "silu", ALONE),
    ((3, 32, 608, 71, 9), resident.Config(2, 2, 1, 2, 2), "", ALONE),
    ((2, 256, 1032, 96, 16), resident.Config(2, 1, 3, 2, 3, 2), "silu", HOPPER),
    ((8, -1, 640, 33, 5), resident.Config(1, 1, 1, 4, 2), "", HOPPER),
    ((2, 128, 512, 53, 11), resident.Config(3, 1, 1, 1, 2), "", ALONE),
]


@needs_gxx
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize(("shape", "config", "act", "target"), RESIDENT)
def test_blocks_that_share_k_match_float64(
    shape: tuple[int, ...],
    config: resident.Config,
    act: str,
    target: Target,
    zeros: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BuiltFor, "target", target)
    monkeypatch.setattr(resident, "AT_ONCE", {config.splits: 2})
    attrs = {"out_act": act} if act else {}
    check = cases_fused._case("shared", *shape, attrs, zeros, residual=not act)
    func = resident_linear.build(check.case, target, config)
    before = check.make_inputs(np.random.default_rng(0))
    passed, said = check.check(before, _run(func, target, before, shape[-1], tmp_path))
    assert passed, said


@needs_gxx
@pytest.mark.parametrize("largest", [1.992156, 1.99217, 1.9921875, 65519.0, 1e30])
def test_largest_activations_are_integers_of_two_digits(
    largest: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32,639 is the largest: what would be rounded to 32,640 takes a larger unit, also beyond half precision."""
    monkeypatch.setattr(BuiltFor, "target", HOPPER)
    relu = {"input": "activated", "act": "relu", "input_dtype": "float32"}
    check = cases_fused._case("largest", 4, 128, 256, 32, 1, relu, True, residual=True)
    func = select(check.case, HOPPER).kernel.prim_func(check.case, HOPPER)
    before = check.make_inputs(np.random.default_rng(0))
    before[0][0, :] = largest
    before[0][0, 5:] = np.float32(largest / 3)
    after = _run(func, HOPPER, before, 1, tmp_path)
    scaled = [before[0] / np.float32(largest), *before[1:-2], np.zeros_like(before[-2]), before[-1]]
    expected = cases_fused._expected(check.case, Grouping.of(4, 256, 128), scaled) * largest + before[-2]
    np.testing.assert_allclose(after[-1], expected, rtol=1e-3, atol=largest * 1e-3)


@needs_gxx
@pytest.mark.parametrize(("size", "rows"), [(1e-6, 1), (1e5, 1), (3e-3, 3)])
def test_the_scale_of_a_norm_follows_the_product(
    size: float, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is multiplied is not normed yet, so it may be far from one; each row has a scale of its own."""
    monkeypatch.setattr(BuiltFor, "target", HOPPER)
    norm = {"input": "rms_norm", "input_dtype": "float32", "eps": 1e-14, "has_norm_weight": True, "weight_offset": 1.0}
    check = cases_fused._case("folded", 4, 128, 264, 48, rows, norm, True, residual=True)
    func = select(check.case, HOPPER).kernel.prim_func(check.case, HOPPER)
    assert "FOLDED = true" in cuda_emulator.cuda_source(func, HOPPER)
    before = check.make_inputs(np.random.default_rng(0))
    before[0] *= np.float32(size) * 10.0 ** np.arange(rows, dtype=np.float32)[:, None]
    after = _run(func, HOPPER, before, rows, tmp_path)
    passed, said = check.check(before, after)
    assert passed, said


def test_activations_that_cost_more_than_a_launch_are_not_made_in_every_block() -> None:
    attrs = {
        "in_features": 14336,
        "out_features": 4096,
        "bits": 4,
        "group_size": 128,
        "has_zeros": False,
        "has_bias": False,
    }
    gated = {"input": "gated", "act": "silu", "width": 28672, "at": 0, "up_width": 28672, "up_at": 14336}
    assert select(Case.make("fused_linear", "float16", 1, **attrs, **gated), HOPPER)
    with pytest.raises(NoKernelError, match="cheaper to make once"):
        select(Case.make("fused_linear", "float16", 4, **attrs, **gated), HOPPER)


def test_activations_between_eights_are_refused() -> None:
    attrs = {"in_features": 64, "out_features": 32, "bits": 4, "group_size": 32, "has_zeros": False, "has_bias": False}
    gated = {"input": "gated", "act": "silu", "width": 140, "at": 4, "up_width": 140, "up_at": 70}
    with pytest.raises(NoKernelError, match="in eights"):
        select(Case.make("fused_linear", "float16", 1, **attrs, **gated), HOPPER)


@pytest.mark.parametrize("target", [HOPPER, OLDER])
def test_only_hopper_launches_before_the_previous_kernel_ends(target: Target) -> None:
    check = SMALL[0]
    func = select(check.case, target).kernel.prim_func(check.case, target)
    tags = [str(t) for t in (func.attrs.get("tirx.kernel_launch_params") or [])]
    assert ("tirx.use_programtic_dependent_launch" in tags) == (target is HOPPER)
    source = cuda_emulator.cuda_source(func, target)
    assert ("DEPENDENT = true" in source) == (target is HOPPER)
