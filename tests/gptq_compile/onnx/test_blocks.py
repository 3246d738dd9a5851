# SPDX-License-Identifier: Apache-2.0
"""Groups as blocks: unpacked by the operator's documented rule they are the same weights, exactly."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_compile.onnx import blocks as layout


def _unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Rows of bytes as numbers of ``bits``, low bits first (MatMulNBits' documentation)."""
    numbers = np.stack([(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)], axis=-1)
    return numbers.reshape(packed.shape[0], -1)[:, :count]


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    columns=st.integers(1, 300),
    group=st.integers(1, 320),
    sym=st.booleans(),
    order=st.sampled_from(["none", "permuted", "uneven"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_the_operator_multiplies_by_the_same_weights(
    bits: int, columns: int, group: int, sym: bool, order: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows, groups = 3, -(-columns // group)
    g_idx = None
    if order == "permuted":
        g_idx = rng.permutation(np.arange(columns) // group)
    elif order == "uneven":
        g_idx = rng.integers(0, groups, columns)
    codes = rng.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    scales = rng.standard_normal((rows, groups)).astype(np.float32)
    zeros = None if sym else rng.integers(0, 1 << bits, (rows, groups), dtype=np.uint8)
    index = np.arange(columns) // group if g_idx is None else g_idx
    zero = 1 << (bits - 1) if zeros is None else zeros.astype(np.float32)[:, index]
    dense = (codes.astype(np.float32) - zero) * scales[:, index]

    blocks = layout.arrange(columns, group, g_idx)
    field = layout.field_bits(bits)
    packed, steps, points = layout.pack(blocks, bits, codes, scales, zeros)
    count = len(blocks.groups)
    assert blocks.size in (16, 32, 64, 128, 256) and packed.shape == (rows, count, blocks.size * field // 8)
    places = len(blocks.columns)  # the operator's K
    assert count == -(-places // blocks.size)
    values = _unpack(packed.reshape(rows, -1), field, count * blocks.size).astype(np.float32)
    middle = _unpack(points, field, count).astype(np.float32)
    if not layout.explicit_zeros(bits, not sym):
        middle = np.full((rows, count), 1 << (field - 1), np.float32)
    weights = (values - np.repeat(middle, blocks.size, 1)) * np.repeat(steps, blocks.size, 1)
    gathered = np.arange(places) if blocks.gather is None else blocks.gather
    scattered = np.zeros((rows, columns), np.float32)
    np.add.at(scattered, (slice(None), gathered), weights[:, :places])
    np.testing.assert_array_equal(scattered, dense)


def test_groups_that_the_operator_has_are_left_alone() -> None:
    for group in (16, 32, 64, 128, 256):
        blocks = layout.arrange(512, group, None)
        assert blocks.size == group and blocks.gather is None
    whole = layout.arrange(576, 576, None)
    assert whole.size == 128 and whole.gather is None and set(whole.groups) == {0}
    assert layout.arrange(576, 96, None).gather is None  # blocks of 32
