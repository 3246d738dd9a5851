# SPDX-License-Identifier: Apache-2.0
"""The registry picks fast to slow, keeps refusals, and its error lists all of them."""

from __future__ import annotations

import pytest

from gptq_compile.errors import NoKernelError
from gptq_compile.kernels.registry import Case, Kernel, Refusal, select
from gptq_compile.kernels.target import Target

CPU = Target.parse("cpu:x86-64-v3")


def _kernel(name: str, max_rows: int | None) -> Kernel:
    def accepts(case: Case, target: Target) -> Refusal | None:
        if max_rows is not None and (case.rows is None or case.rows > max_rows):
            return Refusal(f"needs at most {max_rows} static rows")
        return None

    return Kernel(name, "op", accepts, lambda case, target: None)


def test_the_first_kernel_that_accepts_wins_and_refusals_are_kept():
    kernels = (_kernel("fast", 1), _kernel("middle", 4), _kernel("slow", None))
    assert select(Case.make("op", "float32", 1), CPU, kernels).kernel.name == "fast"
    picked = select(Case.make("op", "float32"), CPU, kernels)
    assert picked.kernel.name == "slow"
    assert picked.refused == (
        ("fast", "needs at most 1 static rows"),
        ("middle", "needs at most 4 static rows"),
    )


def test_no_kernel_lists_every_reason():
    kernels = (_kernel("fast", 1), _kernel("middle", 4))
    with pytest.raises(NoKernelError) as error:
        select(Case.make("op", "float32", 9, width=3), CPU, kernels)
    assert str(error.value) == (
        "No kernel of target cpu:x86-64-v3 implements op(width=3; float32, rows=9):\n"
        "  fast: needs at most 1 static rows\n"
        "  middle: needs at most 4 static rows"
    )


def test_unknown_op_names_the_known_ones():
    with pytest.raises(NoKernelError, match=r"implements 'nothing'\. Known ops: op"):
        select(Case.make("nothing", "float32"), CPU, (_kernel("fast", 1),))


def test_a_kernel_refuses_another_op():
    refusal = _kernel("fast", None).can_implement(Case.make("other", "float32"), CPU)
    assert refusal is not None and refusal.reason == "implements op, not other"


def test_cases_are_hashable_and_order_free():
    a = Case.make("op", "float32", bits=4, group_size=32)
    b = Case.make("op", "float32", group_size=32, bits=4)
    assert a == b and hash(a) == hash(b)
    assert a["bits"] == 4 and a.get("missing", 7) == 7
    with pytest.raises(KeyError, match="no attribute 'missing'"):
        a["missing"]
