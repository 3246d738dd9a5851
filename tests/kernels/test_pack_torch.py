# SPDX-License-Identifier: Apache-2.0
"""Packing with torch gives the bits of the numpy packing that defines the format."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch

from gptq_compile.kernels import layouts, pack_torch
from gptq_compile.kernels.registry import Case


@pytest.mark.parametrize("layout", [layouts.LaneInterleaved(), layouts.RowWords()], ids=lambda x: x.name)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "group"), [(16, 128, 32), (37, 100, 40), (5, 33, -1), (3, 7, 7)])
@pytest.mark.parametrize("has_zeros", [True, False])
def test_same_bits_as_numpy(layout, bits, rows, columns, group, has_zeros):
    case = Case.make(
        "quant_linear", "float32", None, bits=bits, group_size=group, in_features=columns, out_features=rows,
        has_zeros=has_zeros, has_bias=False, out_dtype="float32",
    )  # fmt: skip
    rng = np.random.default_rng(bits * rows)
    groups = layouts.grouping_of(case).groups
    codes = rng.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    scales = rng.random((rows, groups)).astype(np.float16).astype(np.float32)
    zeros = rng.integers(0, 1 << bits, (rows, groups), dtype=np.uint8) if has_zeros else None
    expected = layout.pack(case, codes, scales, zeros)
    with mock.patch.object(pack_torch, "_CHUNK", 8 * columns):  # several chunks of rows
        got = pack_torch.pack(
            layout, case, *(None if a is None else torch.from_numpy(a) for a in (codes, scales, zeros))
        )
    assert list(got) == list(expected)
    for name, array in expected.items():
        assert got[name].numpy().dtype == array.dtype
        np.testing.assert_array_equal(got[name].numpy(), array)
