# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and LayerNorm against float64 on poisoned outputs: odd widths, optional parameters, both targets."""

from __future__ import annotations

import pytest

from gptq_compile.kernels.norm_params import refuse_norm
from gptq_compile.kernels.registry import Case
from tests.gpu.cases_ops import mixed_norm_cases, norm_cases
from tests.gpu.op_case import mismatch
from tests.kernels import op_runner

CASES = [*norm_cases("float32"), *norm_cases("float16")]
MIXED = mixed_norm_cases()


@pytest.mark.parametrize("op_case", [*CASES, *MIXED], ids=lambda c: c.name)
def test_cpu_matches_float64(op_case):
    op_runner.check_cpu(op_case)


@op_runner.needs_gxx
@pytest.mark.parametrize("op_case", [CASES[1], CASES[3], CASES[13], CASES[15], *MIXED], ids=lambda c: c.name)
def test_cuda_source_matches_float64(op_case, tmp_path):
    op_runner.check_emulated(op_case, op_case.case.rows or 3, tmp_path)


@op_runner.needs_nvcc
def test_cuda_machine_code(tmp_path):
    op_runner.check_nvcc([CASES[1], CASES[2], CASES[8], CASES[12], *MIXED[:4], *MIXED[6:]], tmp_path)


@pytest.mark.parametrize("what", ["weight_dtype", "out_dtype"])
def test_other_types_are_refused_by_name(what):
    case = Case.make("rms_norm", "float32", None, channels=64, eps=1e-5, **{what: "bfloat16"})
    name = {"weight_dtype": "weights", "out_dtype": "outputs"}[what]
    assert str(refuse_norm(case)) == f"{name} are bfloat16; this kernel is written for float32 and float16"


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
