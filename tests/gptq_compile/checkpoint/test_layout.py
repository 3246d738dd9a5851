# SPDX-License-Identifier: Apache-2.0
"""Packing against an independent statement of the format, and its inverse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_compile.checkpoint.layout import BITS, pack, pack_zeros, unpack, unpack_zeros, words_for


def as_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """One column as the format says it: a little-endian stream of bits, cut into words. Integers of Python."""
    stream = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    return np.array([(stream >> (32 * w)) & 0xFFFFFFFF for w in range(words_for(len(codes), bits))], np.uint32)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 100), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_pack_and_unpack_are_inverse_and_follow_the_format(bits: int, count: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (count, columns)).astype(np.uint8)
    words = pack(torch.from_numpy(codes), bits)
    assert words.dtype == torch.int32 and words.shape == (words_for(count, bits), columns)
    for c in range(columns):
        np.testing.assert_array_equal(words[:, c].numpy().view(np.uint32), as_stream(codes[:, c], bits))
    np.testing.assert_array_equal(unpack(words, bits, count).numpy(), codes)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_words_survive_unpacking(bits: int, runs: int, columns: int, seed: int) -> None:
    words = torch.from_numpy(
        np.random.default_rng(seed).integers(-(2**31), 2**31, (runs * bits, columns)).astype(np.int32)
    )
    assert torch.equal(pack(unpack(words, bits, 32 * runs), bits), words)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BITS), st.sampled_from([1, 2]), st.integers(1, 40), st.integers(0, 2**32 - 1), st.booleans())
def test_zero_points_come_back(bits: int, version: int, out: int, seed: int, carries: bool) -> None:
    low = 1 if version == 1 else 0
    zeros = torch.from_numpy(np.random.default_rng(seed).integers(low, 1 << bits, (3, out)).astype(np.uint8))
    words = pack_zeros(zeros, bits, version)
    assert words.shape == (3, words_for(out, bits))
    assert torch.equal(unpack_zeros(words, bits, out, version, carries), zeros)


@pytest.mark.parametrize(
    ("bits", "v1", "v2"), [(4, 0x77777777, 0x88888888), (2, 0x55555555, 0xAAAAAAAA), (8, 0x7F7F7F7F, 0x80808080)]
)
def test_words_of_symmetric_zero_points(bits: int, v1: int, v2: int) -> None:
    zeros = torch.full((1, 32), 1 << (bits - 1), dtype=torch.uint8)
    for version, word in ((1, v1), (2, v2)):
        assert set(pack_zeros(zeros, bits, version).numpy().view(np.uint32).ravel().tolist()) == {word}


def test_three_bits_straddle_words() -> None:
    codes = torch.zeros((32, 1), dtype=torch.uint8)
    codes[10], codes[21] = 0b101, 0b110
    words = pack(codes, 3).numpy().view(np.uint32).ravel().tolist()
    assert words == [0b01 << 30, 0b1 | 0b0 << 31, 0b11]


def test_a_zero_point_of_0_is_not_written_as_version_1_and_read_both_ways() -> None:
    zeros = torch.tensor([[0, 5, 7, 9, 1, 2, 3, 15]], dtype=torch.uint8)
    with pytest.raises(ValueError, match="zero point is 0"):
        pack_zeros(zeros, 4, 1)
    by_field = pack((zeros.t() + 15) & 15, 4).t()  # AutoGPTQ's reading: 0 wraps to 15 in its field
    assert torch.equal(unpack_zeros(by_field, 4, 8, 1), zeros)
    by_word = pack(zeros.t(), 4).t() - 0x11111111  # GPTQModel's writing: the 0 borrows from its neighbour
    assert not torch.equal(by_field, by_word)
    assert torch.equal(unpack_zeros(by_word, 4, 8, 1, carries=True), zeros)
