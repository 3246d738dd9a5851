# SPDX-License-Identifier: Apache-2.0
"""Gated activations against float64: every function, wide range of inputs, both targets."""

from __future__ import annotations

import numpy as np
import pytest

from gptq_compile.errors import NoKernelError
from gptq_compile.kernels import activations, reference
from gptq_compile.kernels.registry import Case, select
from gptq_compile.kernels.tvm_env import tvm
from tests.gpu.cases_ops import gated_cases
from tests.kernels import op_runner

CASES = [*gated_cases("float32"), *gated_cases("float16")]


def test_every_activation_has_a_reference_and_a_case():
    assert set(activations.ACTIVATIONS) == set(reference.ACTIVATIONS) == {c.case["act"] for c in CASES}


@pytest.mark.parametrize("op_case", CASES, ids=lambda c: c.name)
def test_cpu_matches_float64(op_case):
    op_runner.check_cpu(op_case)


@pytest.mark.parametrize("act", sorted(reference.ACTIVATIONS))
def test_cpu_over_the_whole_range(act):
    """No NaN and no lost digits for tiny, large and huge inputs."""
    x = np.concatenate([s * np.logspace(-20, 4, 500) for s in (-1, 1)]).astype(np.float32)[None]
    case = Case.make("gated_act", "float32", features=x.size, act=act)
    kernel = select(case, op_runner.CPU, op_runner.kernels("cpu")).kernel
    library = tvm.compile(kernel.prim_func(case, op_runner.CPU), target=op_runner.CPU.tvm())
    out = tvm.runtime.tensor(np.full_like(x, np.nan))
    library["gated_act"](tvm.runtime.tensor(x), tvm.runtime.tensor(np.ones_like(x)), out)
    with np.errstate(over="ignore"):
        expected = reference.gated_act(x, np.ones_like(x), act)
    np.testing.assert_allclose(out.numpy(), expected, rtol=2e-6, atol=1e-6)


@op_runner.needs_gxx
@pytest.mark.parametrize(
    "op_case", [c for c in CASES if c.case.rows == 1 or "f33-" in c.name][::3], ids=lambda c: c.name
)
def test_cuda_source_matches_float64(op_case, tmp_path):
    op_runner.check_emulated(op_case, op_case.case.rows, tmp_path)


@op_runner.needs_nvcc
def test_cuda_machine_code(tmp_path):
    op_runner.check_nvcc(CASES[:2] + CASES[-2:], tmp_path)


@pytest.mark.parametrize("target", [op_runner.CPU, op_runner.CUDA], ids=str)
def test_unknown_activation_is_refused_by_name(target):
    with pytest.raises(NoKernelError, match=r"activation 'swish2' is not one of .*silu"):
        select(Case.make("gated_act", "float32", features=8, act="swish2"), target, op_runner.kernels(target.kind))
