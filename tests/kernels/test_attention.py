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
from gptq_compile.kernels.cache_format import CacheFormat, row_width
from gptq_compile.kernels.registry import Case, select
from gptq_compile.kernels.tvm_env import tvm
from tests.gpu.cases_attention import attention, attention_cases
from tests.kernels import op_runner

# What the CPU's caches hold; keys lie by column.
COLUMNS = {dtype: CacheFormat(dtype, True) for dtype in ("float32", "float16", "int8")}
CASES = attention_cases("float32", COLUMNS["float32"])
_HALF = ("h9k3", "d80", "v32")
HALF = [c for c in attention_cases("float16", COLUMNS["float16"]) if any(part in c.name for part in _HALF)]
_NARROW = ("append", "h9k3", "h7k1", "v32", "d24v72", "d12v20")
NARROW = [
    c for dtype in ("float16", "int8") for c in attention_cases("float32", COLUMNS[dtype])
    if any(part in c.name for part in _NARROW)
]  # fmt: skip
# Small enough for the emulator: every option, both kernels.
EMULATED = [
    attention("float16", 1, 3, 1, 64, longest=100),
    attention("float16", 2, 4, 2, 80, window=20, sinks=True, longest=40),
    attention("float32", None, 4, 2, 48, 32, window=33, softcap=20.0, sinks=True, alibi=True, longest=60),
]


@pytest.mark.parametrize("op_case", [*CASES, *HALF, *NARROW], ids=lambda c: c.name)
def test_cpu_matches_float64(op_case):
    op_runner.check_cpu(op_case)


def test_few_static_tokens_split_the_context_and_many_share_it():
    names = [op_runner.kernel_name(attention("float32", n, 4, 2, 32), op_runner.CPU) for n in (1, 16, 17, None)]
    assert names == ["cpu.paged_attention.split"] * 2 + ["cpu.paged_attention.blocked"] * 2
    names = [op_runner.kernel_name(attention("float16", n, 32, 8, 128), op_runner.CUDA) for n in (1, 16, 17, None)]
    assert names == ["cuda.paged_attention.split"] * 2 + ["cuda.paged_attention.block"] * 2


@pytest.mark.parametrize("cache", COLUMNS.values(), ids=lambda c: c.dtype)
def test_decode_equals_prefill(cache):
    """The last token alone and as the end of a prompt see the same keys."""
    many = attention("float32", None, 6, 2, 32, cache=cache)
    arguments = many.make_inputs(np.random.default_rng(3), 40)
    arguments[4][:], arguments[3][:] = arguments[4][0], np.minimum(np.arange(40), arguments[3][0])
    outs = []
    for op_case, rows in ((many, slice(None)), (attention("float32", 1, 6, 2, 32, cache=cache), slice(39, 40))):
        call = [a[rows] if i in (0, 3, 4, 6) else a for i, a in enumerate(arguments)]
        tensors = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in call]
        library = tvm.compile(op_runner.prim_func(op_case, op_runner.CPU), target=op_runner.CPU.tvm())
        library["paged_attention"](*tensors)
        outs.append(tensors[-1].numpy()[-1])
    np.testing.assert_allclose(outs[0], outs[1], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def any_context():
    op_case = attention("float32", None, 2, 1, 8, window=0, cache=COLUMNS["float32"])
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
    with pytest.raises(NoKernelError, match="the cache is int4"):
        select(Case.make("kv_append", "float32", kv_heads=2, head_dim=64, cache_dtype="int4"), target, kernels)


def test_cuda_caches_have_the_type_of_the_activations():
    for op in ("kv_append", "paged_attention"):
        case = Case.make(op, "float16", 1, heads=4, kv_heads=2, head_dim=64, cache_dtype="int8")
        with pytest.raises(NoKernelError, match="the cache is int8 and activations are float16"):
            select(case, op_runner.CUDA)


@settings(max_examples=60, deadline=None)
@given(
    cache=st.sampled_from([*COLUMNS.values(), CacheFormat("int8"), CacheFormat("float16")]),
    heads=st.integers(1, 3), dim=st.integers(1, 20), keys=st.booleans(), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_formats_of_the_cache(cache, heads, dim, keys, seed):
    rows = np.random.default_rng(seed).standard_normal((2, heads, 16, dim)).astype(np.float32)
    stored = cache.encode(rows, keys)
    assert stored.shape == (2, heads, 16, row_width(cache.dtype, dim)) and str(stored.dtype) == cache.dtype
    assert cache.join(*cache.split(stored, keys), keys).tobytes() == stored.tobytes()
    # Half a code of the row's own scale, or 11 bits of each value.
    allowed = np.abs(rows).max(-1, keepdims=True) / 253.9 if cache.dtype == "int8" else np.abs(rows) / 2047
    assert (np.abs(cache.decode(stored, keys) - rows) <= allowed + 1e-7).all()
    column = np.ascontiguousarray(stored).reshape(2, heads, -1)[..., :16]
    by_column = keys and cache.key_columns  # then the first 16 elements are the first feature of every key
    first = rows[..., 0] if by_column else rows.reshape(2, heads, -1)[..., :16]
    if cache.dtype != "int8":
        np.testing.assert_array_equal(column, first.astype(cache.dtype))
