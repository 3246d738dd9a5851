# SPDX-License-Identifier: Apache-2.0
"""The table of kernels that are built here and checked on a GPU elsewhere.

`cases_linear` makes `KernelCase` directly, `cases_ops` has its own table, adapted here. Neither imports TVM or torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gptq_compile.kernels.registry import Case
from gptq_compile.kernels.target import Target

Arguments = list[np.ndarray]


@dataclass(frozen=True)
class KernelCase:
    """One check.

    Attributes:
        name: unique.
        case: what the kernel computes; checks with equal cases share one built function.
        make_inputs: ``(rng) -> arguments`` of the PrimFunc in order, outputs included and poisoned (see `poisoned`).
        check: ``(arguments before, arguments after the call) -> (passed, what was measured)``.
        kernel: name of the kernel to build, or None for the one `select` picks.
    """

    name: str
    case: Case
    make_inputs: Callable[[np.random.Generator], Arguments]
    check: Callable[[Arguments, Arguments], tuple[bool, str]]
    kernel: str | None = None


class BuiltFor:
    """For which target the kernels under test are built: it decides how weights are packed."""

    target = Target.parse("cuda")


def poisoned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Returns an output buffer whose every element is wrong until the kernel writes it."""
    return np.full(shape, np.nan, dtype)


def mean_error(got: np.ndarray, expected: np.ndarray, bound: float = 1e-3) -> tuple[bool, str]:
    """Compares by mean|difference| / mean|expected|, Marlin's bar; a NaN fails."""
    error = float(np.abs(got.astype(np.float64) - expected).mean() / np.abs(expected).mean())
    return bool(error <= bound), f"mean error {error:.2e}"


def all_cases() -> list[KernelCase]:
    """Collects every check."""
    import cases_decode
    import cases_fused
    import cases_linear

    from tests.gpu import cases_ops
    from tests.gpu.op_case import OpCase, mismatch

    found = cases_linear.cases() + cases_fused.cases() + cases_decode.cases()
    for op_case in (*cases_ops.op_cases("float16"), *cases_ops.op_cases("float32")):
        for n in op_case.sizes:

            def make(rng: np.random.Generator, op_case: OpCase = op_case, n: int = n) -> Arguments:
                return op_case.make_inputs(rng, n)

            def check(before: Arguments, after: Arguments, op_case: OpCase) -> tuple[bool, str]:
                wrong = mismatch(op_case, before, after)
                return wrong is None, wrong or "within tolerance"

            found.append(
                KernelCase(f"{op_case.name}-m{n}", op_case.case, make, functools.partial(check, op_case=op_case))
            )
    names = [case.name for case in found]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"Case names must be unique: {', '.join(repeated)}.")
    return found


def symbols(cases: list[KernelCase]) -> dict[str, str]:
    """Returns check name -> name of its function in the library; equal cases share a function."""
    functions: dict[tuple[Case, str | None], str] = {}
    for case in cases:
        functions.setdefault((case.case, case.kernel), f"kernel_{len(functions)}")
    return {case.name: functions[case.case, case.kernel] for case in cases}
