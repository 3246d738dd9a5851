# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and LayerNorm against float64 on poisoned outputs: odd widths, optional parameters, both targets."""

from __future__ import annotations

import pytest

from tests.gpu.cases_ops import mismatch, norm_cases
from tests.kernels import op_runner

CASES = [*norm_cases("float32"), *norm_cases("float16")]


@pytest.mark.parametrize("op_case", CASES, ids=lambda c: c.name)
def test_cpu_matches_float64(op_case):
    op_runner.check_cpu(op_case)


@op_runner.needs_gxx
@pytest.mark.parametrize("op_case", [CASES[1], CASES[3], CASES[13], CASES[15]], ids=lambda c: c.name)
def test_cuda_source_matches_float64(op_case, tmp_path):
    op_runner.check_emulated(op_case, op_case.case.rows, tmp_path)


@op_runner.needs_nvcc
def test_cuda_machine_code(tmp_path):
    op_runner.check_nvcc([CASES[1], CASES[2], CASES[8], CASES[12]], tmp_path)


def test_a_poisoned_element_is_an_error():
    """The comparison itself fails on an output that was not written."""
    import numpy as np

    op_case = CASES[0]
    arguments = op_case.make_inputs(np.random.default_rng(0), 3)
    results = [a.copy() for a in arguments]
    results[-1][...] = op_case.reference(arguments)[2].astype(np.float32)
    assert mismatch(op_case, arguments, results) is None
    results[-1][2, 5] = np.nan
    assert "1 NaN" in (mismatch(op_case, arguments, results) or "")
    results[-1][2, 5] = 100.0
    assert "error" in (mismatch(op_case, arguments, results) or "")
