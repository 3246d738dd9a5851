# SPDX-License-Identifier: Apache-2.0
"""CPU linear against float64: odd shapes, tails, static and symbolic rows, mixed dtypes, poisoned outputs."""

from __future__ import annotations

import numpy as np
import pytest

from gptq_compile.kernels.cpu.linear import KERNELS
from gptq_compile.kernels.registry import Case, select
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import tvm

CPU = Target.parse("cpu")


@pytest.mark.parametrize("rows", (1, 2, 7, 33))
@pytest.mark.parametrize("static", (True, False))
@pytest.mark.parametrize(("k", "n", "has_bias"), [(64, 37, True), (19, 8, False), (5, 3, True)])
def test_matches_float64(rows, static, k, n, has_bias):
    got, reference = _run(rows, static, k, n, has_bias, {})
    assert np.sum((got - reference) ** 2) / np.sum(reference**2) < 1e-12


def test_half_precision_weights_with_float32_activations():
    got, reference = _run(5, False, 50, 21, True, {"weight_dtype": "float16"})
    assert got.dtype == np.float32
    assert np.sum((got - reference) ** 2) / np.sum(reference**2) < 1e-12


def test_half_precision_activations_give_float32_logits():
    got, reference = _run(3, False, 50, 21, False, {"out_dtype": "float32"}, dtype="float16")
    assert got.dtype == np.float32
    assert np.sum((got - reference) ** 2) / np.sum(reference**2) < 1e-12


def _run(rows, static, k, n, has_bias, dtypes, dtype="float32"):
    rng = np.random.default_rng(rows * 100 + k)
    case = Case.make(
        "linear", dtype, rows if static else None, in_features=k, out_features=n, has_bias=has_bias, **dtypes
    )
    x = rng.normal(size=(rows, k)).astype(dtype)
    w = rng.normal(size=(n, k)).astype(dtypes.get("weight_dtype", dtype))
    bias = rng.normal(size=n).astype(dtype)
    library = tvm.compile(select(case, CPU, KERNELS).kernel.prim_func(case, CPU), target=CPU.tvm())
    out = tvm.runtime.tensor(np.full((rows, n), np.nan, dtypes.get("out_dtype", dtype)))
    library["linear"](*map(tvm.runtime.tensor, [x, w, *([bias] if has_bias else [])]), out)
    reference = x.astype(np.float64) @ w.astype(np.float64).T + (bias.astype(np.float64) if has_bias else 0)
    return out.numpy(), reference


def test_refuses_other_dtypes_in_words():
    case = Case.make("linear", "float32", in_features=4, out_features=4, has_bias=False, weight_dtype="int8")
    refusal = KERNELS[0].can_implement(case, CPU)
    assert refusal is not None and refusal.reason == "needs float32 or float16 weights, not int8"
