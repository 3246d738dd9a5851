# SPDX-License-Identifier: Apache-2.0
"""The attention of a decode step for CUDA: the generated source, run by an emulator, clusters of blocks included."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))

import cases_decode
import cuda_emulator

from gptq_compile.errors import NoKernelError
from gptq_compile.kernels.cuda import decode_attention
from gptq_compile.kernels.registry import Case, select
from gptq_compile.kernels.target import Target
from tests.kernels.op_runner import needs_gxx

HOPPER = Target.parse("cuda:sm_90")
SMALL = [c for c in cases_decode.cases() if c.case["heads"] <= 6]


def _run(check: cases_decode.KernelCase, folder: Path) -> tuple[bool, str]:
    func = select(check.case, HOPPER).kernel.prim_func(check.case, HOPPER)
    before = check.make_inputs(np.random.default_rng(1))
    after = [a.copy() for a in before]
    names = [p.name.removesuffix("_ptr") for p in func.params]
    tensors = dict(zip(names, after, strict=True))
    # The only dimension that the kernel is told is the width of the page table.
    cuda_emulator.run(func, HOPPER, tensors, tensors["page_table"].shape[1], folder)
    return check.check(before, after)


@needs_gxx
@pytest.mark.parametrize("check", SMALL, ids=[c.name for c in SMALL])
def test_decode_attention_matches_float64(check: cases_decode.KernelCase, tmp_path: Path) -> None:
    passed, said = _run(check, tmp_path)
    assert passed, said


@needs_gxx
def test_a_negative_slot_is_not_appended(tmp_path: Path) -> None:
    check = SMALL[0]
    func = select(check.case, HOPPER).kernel.prim_func(check.case, HOPPER)
    arrays = check.make_inputs(np.random.default_rng(2))
    tensors = dict(zip([p.name.removesuffix("_ptr") for p in func.params], arrays, strict=True))
    tensors["slots"][:] = -1
    before = tensors["k_cache"].copy()
    cuda_emulator.run(func, HOPPER, tensors, tensors["page_table"].shape[1], tmp_path)
    np.testing.assert_array_equal(tensors["k_cache"], before)
    assert np.isfinite(tensors["out"]).all()


@needs_gxx
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_any_number_of_parts_matches_float64(parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_attention, "AT_ONCE", {1: 132, parts: 132})
    check = next(c for c in SMALL if c.case.rows == 3)
    passed, said = _run(check, tmp_path)
    assert passed, said


@pytest.mark.parametrize(
    ("group", "rows", "parts", "resident"),
    [
        (4, 1, 8, 1), (4, 2, 4, 1), (4, 4, 4, 2), (4, 8, 2, 1), (4, 16, 2, 2), (4, 32, 1, 2), (4, 64, 1, 2),
        (3, 1, 8, 2), (3, 3, 8, 2), (3, 4, 4, 2), (8, 1, 8, 1), (8, 2, 4, 1), (8, 64, 1, 1),
    ],
)  # fmt: skip
def test_all_clusters_of_a_step_run_at_once(group: int, rows: int, parts: int, resident: int) -> None:
    """Eight key heads of 128: of eight blocks 15 clusters fit on an H200, so 16 would take twice as long."""
    attrs = dict(SMALL[0].case.attrs) | {"heads": 8 * group, "kv_heads": 8, "head_dim": 128, "v_head_dim": 128}
    attrs |= {"rotary_dim": 0, "q_width": 1024 * group, "k_width": 1024, "v_width": 1024}
    case = Case.make("decode_attention", "float16", rows, **attrs)
    source = cuda_emulator.cuda_source(select(case, HOPPER).kernel.prim_func(case, HOPPER), HOPPER)
    assert f"constexpr int S = {parts};" in source
    assert f"__launch_bounds__(256, {resident})" in source
    assert rows * 8 <= decode_attention.AT_ONCE[parts] * resident or rows > 32


def test_few_rows_need_clusters_and_many_do_not() -> None:
    check = SMALL[0]
    older = Target.parse("cuda:sm_80,sm_90")
    with pytest.raises(NoKernelError, match="no clusters of blocks"):
        select(check.case, older)
    many = Case.make("decode_attention", "float16", 64, **dict(check.case.attrs))
    assert select(many, older).kernel.name == "cuda.decode_attention"
    assert "gq_cluster_barrier" not in cuda_emulator.cuda_source(
        select(many, older).kernel.prim_func(many, older), older
    )
