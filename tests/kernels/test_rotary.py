# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding against float64: both pairings, partial rotary dimension, both targets."""

from __future__ import annotations

import pytest

from gptq_compile.errors import NoKernelError
from gptq_compile.kernels.registry import Case, select
from tests.gpu.cases_ops import rotary_cases
from tests.kernels import op_runner

CASES = [*rotary_cases("float32"), *rotary_cases("float16")]


@pytest.mark.parametrize("op_case", CASES, ids=lambda c: c.name)
def test_cpu_matches_float64(op_case):
    op_runner.check_cpu(op_case)


@op_runner.needs_gxx
@pytest.mark.parametrize("op_case", [c for c in CASES if "d80" in c.name or "d96" in c.name], ids=lambda c: c.name)
def test_cuda_source_matches_float64(op_case, tmp_path):
    op_runner.check_emulated(op_case, 3, tmp_path)


@op_runner.needs_nvcc
def test_cuda_machine_code(tmp_path):
    op_runner.check_nvcc([CASES[2], CASES[3], CASES[10]], tmp_path)


@pytest.mark.parametrize("target", [op_runner.CPU, op_runner.CUDA], ids=str)
@pytest.mark.parametrize("rotary_dim", [7, 66])
def test_impossible_rotary_dim_is_refused(target, rotary_dim):
    case = Case.make("rotary_embedding", "float32", heads=2, head_dim=64, rotary_dim=rotary_dim)
    with pytest.raises(NoKernelError, match=f"rotary_dim {rotary_dim} is not an even number"):
        select(case, target, op_runner.kernels(target.kind))
