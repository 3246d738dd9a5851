# SPDX-License-Identifier: Apache-2.0
"""Paged attention and cache append against float64.

Tokens of several sequences are interleaved, pages shuffled, and every cache position that must not be read is NaN.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_compile.errors import NoKernelError
from gptq_compile.kernels.registry import Case, select
from gptq_compile.kernels.tvm_env import tvm
from tests.gpu.cases_ops import attention, attention_cases
from tests.kernels import op_runner

CASES = attention_cases("float32")
_HALF = ("h9k3", "d80", "v32")
HALF = [c for c in attention_cases("float16") if any(part in c.name for part in _HALF)]
# Small enough for the emulator: every option, both kernels.
EMULATED = [
    attention("float16", 1, 3, 1, 64, longest=100),
    attention("float16", 2, 4, 2, 80, window=20, sinks=True, longest=40),
    attention("float32", None, 4, 2, 48, 32, window=33, softcap=20.0, sinks=True, alibi=True, longest=60),
]


@pytest.mark.parametrize("op_case", [*CASES, *HALF], ids=lambda c: c.name)
def test_cpu_matches_float64(op_case):
    op_runner.check_cpu(op_case)


def test_few_static_tokens_split_the_context_and_many_share_it():
    names = [op_runner.kernel_name(attention("float32", n, 4, 2, 32), op_runner.CPU) for n in (1, 16, 17, None)]
    assert names == ["cpu.paged_attention.split"] * 2 + ["cpu.paged_attention.blocked"] * 2
    names = [op_runner.kernel_name(attention("float16", n, 32, 8, 128), op_runner.CUDA) for n in (1, 16, 17, None)]
    assert names == ["cuda.paged_attention.split"] * 2 + ["cuda.paged_attention.block"] * 2


def test_decode_equals_prefill():
    """The last token alone and as the end of a prompt see the same keys."""
    many = attention("float32", None, 6, 2, 32)
    arguments = many.make_inputs(np.random.default_rng(3), 40)
    arguments[4][:], arguments[3][:] = arguments[4][0], np.minimum(np.arange(40), arguments[3][0])
    outs = []
    for op_case, rows in ((many, slice(None)), (attention("float32", 1, 6, 2, 32), slice(39, 40))):
        call = [a[rows] if i in (0, 3, 4, 6) else a for i, a in enumerate(arguments)]
        tensors = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in call]
        library = tvm.compile(op_runner.prim_func(op_case, op_runner.CPU), target=op_runner.CPU.tvm())
        library["paged_attention"](*tensors)
        outs.append(tensors[-1].numpy()[-1])
    np.testing.assert_allclose(outs[0], outs[1], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def any_context():
    op_case = attention("float32", None, 2, 1, 8, window=0)
    return op_case, tvm.compile(op_runner.prim_func(op_case, op_runner.CPU), target=op_runner.CPU.tvm())


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
def test_any_mixture_of_tokens(any_context, n, seed):
    op_case, library = any_context
    arguments = op_case.make_inputs(np.random.default_rng(seed), n)
    tensors = [tvm.runtime.tensor(a) for a in arguments]
    library["paged_attention"](*tensors)
    np.testing.assert_allclose(
        tensors[-1].numpy(), op_case.reference(arguments)[len(arguments) - 1], rtol=2e-5, atol=2e-5
    )


@op_runner.needs_gxx
@pytest.mark.parametrize("op_case", EMULATED, ids=lambda c: c.name)
def test_cuda_source_matches_float64(op_case, tmp_path):
    op_runner.check_emulated(op_case, op_case.case.rows or 3, tmp_path)


@op_runner.needs_nvcc
def test_cuda_machine_code(tmp_path):
    half = attention_cases("float16")
    op_runner.check_nvcc([half[0], half[4], half[17]], tmp_path)


@pytest.mark.parametrize("target", [op_runner.CPU, op_runner.CUDA], ids=str)
def test_impossible_cases_are_refused(target):
    kernels = op_runner.kernels(target.kind)
    with pytest.raises(NoKernelError, match="5 query heads are not a multiple of 2 key heads"):
        select(Case.make("paged_attention", "float32", heads=5, kv_heads=2, head_dim=64), target, kernels)
    with pytest.raises(NoKernelError, match="activations are int8"):
        select(Case.make("kv_append", "int8", kv_heads=2, head_dim=64), target, kernels)
