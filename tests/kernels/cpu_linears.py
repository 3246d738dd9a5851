# SPDX-License-Identifier: Apache-2.0
"""Cases and runs that the tests of the CPU's quantized linears share."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptq_compile.kernels.layouts import layout_for
from gptq_compile.kernels.registry import Case, Kernel, select
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.tvm_env import tvm
from gptq_compile.kernels.words import Grouping


class Ran(NamedTuple):
    """Output ``[rows, n]`` of the kernel that was chosen, its name, and in float64 what its inputs mean."""

    got: NDArray[np.floating]
    name: str
    weight: NDArray[np.float64]
    bias: NDArray[np.float64]

    def reference(self, x: NDArray[np.floating]) -> NDArray[np.float64]:
        """The same product in float64, of activations ``[rows, k]``."""
        with np.errstate(invalid="ignore"):
            return x.astype(np.float64) @ self.weight.T + self.bias


def linear_case(bits, group, k, n, rows, zeros=True, bias=False, dtype="float32", **attrs) -> Case:
    """A quant_linear; ``rows`` None is any number of them."""
    return Case.make(
        "quant_linear", dtype, rows, in_features=k, out_features=n, bits=bits, group_size=group,
        has_zeros=zeros, has_bias=bias, **attrs,
    )  # fmt: skip


def operands(case: Case, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Random activations ``[rows, k]``, codes ``[n, k]`` and, where the case has them, zero points ``[n, groups]``."""
    rng = np.random.default_rng(seed)
    n, k, bits = case["out_features"], case["in_features"], case["bits"]
    codes = rng.integers(0, 1 << bits, (n, k), dtype=np.uint8)
    zeros = rng.integers(0, 1 << bits, (n, Grouping.of(bits, k, case["group_size"]).groups), dtype=np.uint8)
    return rng.normal(size=(rows, k)).astype(case.dtype), codes, zeros if case["has_zeros"] else None


def run_linear(
    kernels: tuple[Kernel, ...], case: Case, target: Target, x: np.ndarray, codes: np.ndarray,
    zeros: np.ndarray | None, machine: Target | None = None,
) -> Ran:  # fmt: skip
    """Runs the first of the kernels that takes the case, with random scales and bias, into a poisoned output.

    ``machine`` is what code is generated for, if not the target that the kernel was written for.
    """
    rng = np.random.default_rng(0)
    n, k, bits = case["out_features"], case["in_features"], case["bits"]
    grouping = Grouping.of(bits, k, case["group_size"])
    scales = (rng.uniform(0.5, 2.0, (n, grouping.groups)) / 100).astype(np.float16).astype(np.float32)
    bias = rng.normal(size=n).astype(case.dtype) if case["has_bias"] else np.zeros(n)
    zero = (zeros if zeros is not None else np.full(scales.shape, 1 << (bits - 1))).astype(np.float64)
    group = np.arange(k) // grouping.group_size
    weight = scales.astype(np.float64)[:, group] * (codes - zero[:, group])
    kernel = select(case, target, kernels).kernel
    library = tvm.compile(kernel.prim_func(case, target), target=(machine or target).tvm())
    out = tvm.runtime.tensor(np.full((len(x), n), np.nan, case.get("out_dtype", case.dtype)))
    packed = layout_for(case, target).pack(case, codes, scales, zeros)
    arguments = [x, *packed.values(), *([bias] if case["has_bias"] else [])]
    library["quant_linear"](*map(tvm.runtime.tensor, arguments), out)
    return Ran(out.numpy(), kernel.name, weight, bias.astype(np.float64))


def nmse(got: np.ndarray, reference: np.ndarray) -> float:
    """Squared error as a fraction of the squared reference."""
    return float(np.sum((got - reference) ** 2) / np.sum(reference**2))
