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
