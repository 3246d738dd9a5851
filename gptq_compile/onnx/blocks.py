# SPDX-License-Identifier: Apache-2.0
"""Quantization groups of any size as the blocks that ``com.microsoft::MatMulNBits`` takes, without loss.

The operator wants blocks of 16, 32, 64, 128 or 256 input features that follow one another, of 2, 4 or 8 bits. A group
is one block or several with the same scale; where no such size divides the group, its columns are followed by padding
of weight zero. Padding and act-order become one ``Gather`` on the activation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCKS = (16, 32, 64, 128, 256)
_WIDENED = {2: 2, 3: 4, 4: 4, 8: 8}
"""Bits of the grid -> bits of a field."""


@dataclass(frozen=True)
class Blocks:
    """How the columns of a weight lie in blocks.

    Attributes:
        size: columns of a block; the last may be short.
        columns: the column at each place, or -1 for padding. ``groups``: the group of each block.
    """

    size: int
    columns: NDArray[np.int64]
    groups: NDArray[np.int64]

    @property
    def gather(self) -> NDArray[np.int64] | None:
        """Which input feature each place reads (padding reads any), or None if they are in order."""
        in_order = np.array_equal(self.columns, np.arange(len(self.columns)))
        return None if in_order else np.maximum(self.columns, 0)


def block_size(group: int, columns: int) -> int:
    """The block size for groups of ``group`` in rows of ``columns``: one that divides it, or the least padding."""
    if group >= columns:  # one scale a row: nothing has to end where a group does
        return next(b for b in BLOCKS if b >= columns or b == 128)
    if group in BLOCKS:
        return group
    fitting = [b for b in BLOCKS if b <= 128 and group % b == 0]
    return fitting[-1] if fitting else min(reversed(BLOCKS[:-1]), key=lambda b: -(-group // b) * b)


def arrange(columns: int, group: int, g_idx: NDArray[np.integer] | None) -> Blocks:
    """Blocks for ``columns`` input features in groups of ``group``, or of the members ``g_idx`` says."""
    index = np.arange(columns) // group if g_idx is None else np.asarray(g_idx, np.int64)
    size = block_size(group, columns)
    present = np.unique(index)
    pieces: list[NDArray[np.int64]] = []
    groups: list[int] = []
    for number in present.tolist():
        members = np.flatnonzero(index == number)
        count = -(-len(members) // size)
        if number != present[-1]:
            members = np.concatenate([members, np.full(count * size - len(members), -1)])
        pieces.append(members)
        groups += [number] * count
    return Blocks(size, np.concatenate(pieces), np.asarray(groups))


def field_bits(bits: int) -> int:
    """Bits of a field that holds codes of ``bits``."""
    return _WIDENED[bits]


def explicit_zeros(bits: int, has_zeros: bool) -> bool:
    """Whether zero points are written: those of an asymmetric grid, and the middle of one that was widened."""
    return has_zeros or field_bits(bits) != bits


def pack(
    blocks: Blocks,
    bits: int,
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    zeros: NDArray[np.uint8] | None,
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    """The operator's ``B``, ``scales`` and ``zero_points``.

    Args:
        blocks: of the columns. ``bits``: of the grid, 2, 3, 4 or 8.
        codes: ``[N, K]``. ``scales``: ``[N, groups]``. ``zeros``: ``[N, groups]``, or None for ``2^(bits-1)``.

    Returns:
        ``[N, blocks, size * field / 8]`` (the first of the columns that share a byte in its low bits),
        ``[N, blocks]`` and ``[N, ceil(blocks * field / 8)]``.
    """
    rows, count = codes.shape[0], len(blocks.groups)
    if zeros is None:
        points = np.full((rows, count), 1 << (bits - 1), np.uint8)
    else:
        points = zeros[:, blocks.groups]
    placed = np.repeat(points, blocks.size, axis=1)  # a code that equals its zero point is a weight of zero
    real = np.flatnonzero(blocks.columns >= 0)
    placed[:, real] = codes[:, blocks.columns[real]]
    field = field_bits(bits)
    packed = _fields(placed, field).reshape(rows, count, blocks.size * field // 8)
    return packed, scales[:, blocks.groups].astype(np.float32), _fields(points, field)


def _fields(values: NDArray[np.uint8], field: int) -> NDArray[np.uint8]:
    """Rows of small numbers packed into bytes, low bits first."""
    per_byte = 8 // field
    rows, width = values.shape
    padded = np.zeros((rows, -(-width // per_byte), per_byte), np.uint8)
    padded.reshape(rows, -1)[:, :width] = values
    out = np.zeros(padded.shape[:2], np.uint8)
    for place in range(per_byte):
        out |= padded[:, :, place] << np.uint8(place * field)
    return out
