# SPDX-License-Identifier: Apache-2.0
"""Linear layers of experts and the choice of experts against float64, both targets."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gptq_compile.errors import NoKernelError
from gptq_compile.kernels.registry import Case, select
from tests.gpu.cases_ops import expert_cases, quant_expert_cases
from tests.kernels import op_runner

CASES = [*expert_cases("float32"), *expert_cases("float16")]
QUANT = {kind: [c for d in ("float32", "float16") for c in quant_expert_cases(kind, d)] for kind in ("cpu", "cuda")}


@pytest.mark.parametrize("op_case", CASES, ids=lambda c: c.name)
def test_cpu_matches_float64(op_case):
    op_runner.check_cpu(op_case)


@op_runner.needs_gxx
@pytest.mark.parametrize("op_case", [*CASES[:4], CASES[5], CASES[6]], ids=lambda c: c.name)
def test_cuda_source_matches_float64(op_case, tmp_path):
    op_runner.check_emulated(op_case, op_case.case.rows or 3, tmp_path)


@op_runner.needs_nvcc
def test_cuda_machine_code(tmp_path):
    op_runner.check_nvcc([CASES[0], CASES[4], CASES[9], CASES[13]], tmp_path)


@pytest.mark.parametrize("op_case", QUANT["cpu"], ids=lambda c: c.name)
def test_quantized_cpu_matches_float64(op_case):
    op_runner.check_cpu(op_case)


@op_runner.needs_gxx
@pytest.mark.parametrize("op_case", QUANT["cuda"][:8], ids=lambda c: c.name)
def test_quantized_cuda_source_matches_float64(op_case, tmp_path):
    op_runner.check_emulated(op_case, op_case.case.rows or 3, tmp_path)


@op_runner.needs_nvcc
def test_quantized_cuda_machine_code(tmp_path):
    op_runner.check_nvcc(QUANT["cuda"][::3], tmp_path)


@pytest.mark.parametrize("number", [-1, 1 << 40])
def test_an_expert_that_does_not_exist_reads_the_nearest(number):
    """A router that saw NaN must not make a kernel read beyond the weights."""
    for op_case, at in ((CASES[2], 2), (QUANT["cpu"][2], 4)):

        def make(rng, m, op_case=op_case, at=at):
            arguments = op_case.make_inputs(rng, m)
            arguments[at][:] = number
            return arguments

        def expect(arguments, op_case=op_case, at=at):
            nearest = np.clip(arguments[at], 0, op_case.case["experts"] - 1)
            return op_case.reference([*arguments[:at], nearest, *arguments[at + 1 :]])

        op_runner.check_cpu(dataclasses.replace(op_case, make_inputs=make, reference=expect))


@pytest.mark.parametrize("target", [op_runner.CPU, op_runner.CUDA], ids=str)
def test_long_rows_are_refused(target):
    with pytest.raises(NoKernelError, match="ranks at most 4096 elements a row, not 50000"):
        select(Case.make("topk", "float32", width=50000, k=4), target, op_runner.kernels(target.kind))
