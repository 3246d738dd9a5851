# SPDX-License-Identifier: Apache-2.0
"""narrow_cache: what the caches become, what that costs, and that rows are stored as the kernels store them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gptq_compile.errors import ConfigError, PassError
from gptq_compile.kernels.cache_format import CacheFormat
from gptq_compile.passes import cache_rows
from gptq_compile.passes.evaluate import evaluate
from gptq_compile.passes.insert_kv_cache import InsertKvCache
from gptq_compile.passes.manager import PassManager
from gptq_compile.passes.narrow_cache import NarrowCache
from tests.architectures import traced

LOST = {"float16": (1e-11, 1e-5), "int8": (1e-7, 1e-2)}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("to", LOST)
def test_a_model(name: str, to: str) -> None:
    made = traced(name)
    ids = torch.arange(3, 40)
    wanted = evaluate(made, ids).double()
    manager = PassManager([InsertKvCache(), NarrowCache(to)])  # and compares with its tolerance
    manager.run(made)
    assert manager.records[-1].modified
    before = made.inputs[[n.name for n in made.inputs].index("page_table") + 1 :]
    assert {str(n.meta["val"].dtype) for n in before} == {f"torch.{to}"}
    low, high = LOST[to]
    for step in (False, True):
        got = evaluate(made, ids, step=step).double()
        assert low < float((got - wanted).square().sum() / wanted.square().sum()) < high
    again = PassManager([NarrowCache(to)])
    again.run(made)
    assert not again.records[0].modified


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="float16 or int8, not bfloat16"):
        NarrowCache("bfloat16")
    with pytest.raises(PassError, match="no cache to narrow"):
        PassManager([NarrowCache("int8")], validate=False).run(traced("llama"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_rows_are_stored_as_the_kernels_store_them(dtype: str) -> None:
    form = CacheFormat(dtype)
    rows = np.random.default_rng(0).standard_normal((3, 2, 16, 12)).astype(np.float32)
    rows[0, 0, 3], rows[1, 1, 5], rows[2, 0, 0, 4] = 0, 1e-38, np.nan
    want = form.encode(rows, True)
    cache = torch.from_numpy(np.zeros_like(want))
    page, offset = (i.reshape(-1) for i in torch.meshgrid(torch.arange(3), torch.arange(16), indexing="ij"))
    cache_rows.store_rows(cache, page, offset, torch.from_numpy(rows).transpose(1, 2).reshape(48, 2, 12))
    got = form.split(cache.numpy(), False), form.split(want, False)
    np.testing.assert_array_equal(got[0][0], got[1][0])
    if dtype == "int8":
        np.testing.assert_allclose(got[0][1], got[1][1], rtol=2e-7)
    loaded = cache_rows.load_rows(cache, torch.tensor([2, 0])).numpy()
    want_rows = form.decode(want, False)[[2, 0]].swapaxes(1, 2).reshape(32, 2, 12)
    np.testing.assert_allclose(loaded, want_rows, rtol=2e-7)
