# SPDX-License-Identifier: Apache-2.0
"""Pack and unpack are exact inverses for every bit width, group size and odd shape."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_compile.errors import ConfigError
from gptq_compile.kernels.layouts import NATURAL_TILES, layout_for
from gptq_compile.kernels.registry import Case
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.words import Grouping, block_codes, block_words, decode, encode, fields

TARGETS = (Target.parse("cpu"), Target.parse("cuda"))
BITS = (2, 3, 4, 8)


def _case(bits: int, group: int, k: int, n: int, zeros: bool) -> Case:
    return Case.make(
        "quant_linear", "float32", None, in_features=k, out_features=n, bits=bits, group_size=group,
        has_zeros=zeros, has_bias=False,
    )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    group=st.sampled_from((1, 7, 20, 32, 100, 128, -1)),
    k=st.integers(1, 300),
    n=st.integers(1, 40),
    has_zeros=st.booleans(),
    target=st.sampled_from(TARGETS),
    natural=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_unpack_inverts_pack(bits, group, k, n, has_zeros, target, natural, seed):
    rng = np.random.default_rng(seed)
    case = _case(bits, group, k, n, has_zeros)
    layout = layout_for(case, target)
    if natural and layout.name == "fragment_tiles":
        layout = NATURAL_TILES
    groups = Grouping.of(bits, k, group).groups
    codes = rng.integers(0, 1 << bits, (n, k), dtype=np.uint8)
    scales = rng.normal(size=(n, groups)).astype(np.float16).astype(np.float32)
    zeros = rng.integers(0, 256, (n, groups), dtype=np.uint8) if has_zeros else None
    packed = layout.pack(case, codes, scales, zeros)
    declared = layout.tensors(case)
    assert list(packed) == list(declared)
    for name, array in packed.items():
        assert (array.shape, str(array.dtype)) == declared[name]
        assert array.flags.c_contiguous
    np.testing.assert_array_equal(layout.unpack(case, packed), codes)
    got_scales, got_zeros = layout.unpack_grid(case, packed)
    np.testing.assert_array_equal(got_scales, scales)
    assert (got_zeros is None) == (zeros is None)
    if zeros is not None:
        np.testing.assert_array_equal(got_zeros, zeros)


@pytest.mark.parametrize("bits", BITS)
def test_blocks_waste_no_bit_and_fields_do_not_overlap(bits):
    used = [0] * block_words(bits)
    for parts in fields(bits):
        assert sum(part.width for part in parts) == bits
        for part in parts:
            mask = ((1 << part.width) - 1) << part.shift
            assert used[part.word] & mask == 0
            used[part.word] |= mask
    assert used == [0xFFFFFFFF] * block_words(bits)
    assert block_codes(bits) * bits == 32 * block_words(bits)


@pytest.mark.parametrize("bits", BITS)
def test_any_words_decode_and_encode_back(bits):
    words = np.random.default_rng(bits).integers(0, 2**32, (5, 6), dtype=np.uint32)
    np.testing.assert_array_equal(encode(bits, decode(bits, words)), words)


def test_known_word_of_four_bit_codes():
    # Even codes fill the low half-word, odd codes the high one.
    assert encode(4, np.arange(8, dtype=np.uint8))[0] == 0x75316420


def test_groups_do_not_share_words():
    grouping = Grouping.of(4, 130, 100)
    assert (grouping.groups, grouping.group_words, grouping.last_size, grouping.row_words) == (2, 13, 30, 17)
    assert not grouping.dense
    assert Grouping.of(4, 130, 64).dense
    assert Grouping.of(3, 64, -1).row_words == 6


@pytest.mark.parametrize("target", TARGETS)
def test_what_does_not_fit_is_refused_in_words(target):
    case = _case(4, 32, 64, 3, False)
    layout = layout_for(case, target)
    codes, scales = np.zeros((3, 64), np.uint8), np.ones((3, 2), np.float32)
    with pytest.raises(ConfigError, match="must be below 16, got 16"):
        layout.pack(case, codes + np.uint8(16), scales, None)
    with pytest.raises(ConfigError, match="exactly representable in float16"):
        layout.pack(case, codes, scales * np.float32(0.1), None)
    with pytest.raises(ConfigError, match="exactly representable in float16"):
        layout.pack(case, codes, scales * np.float32(np.nan), None)
    with pytest.raises(ConfigError, match=r"shape \(3, 2\)"):
        layout.pack(case, codes, scales[:, :1], None)
    with pytest.raises(ConfigError, match="has_zeros says otherwise"):
        layout.pack(case, codes, scales, np.zeros((3, 2), np.uint8))
    with pytest.raises(ConfigError, match="not linear"):
        layout_for(Case.make("linear", "float32"), target)
