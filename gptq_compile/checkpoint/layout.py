# SPDX-License-Identifier: Apache-2.0
"""How GPTQ checkpoints put codes into 32-bit words.

Codes of ``b`` bits lie one after another in a little-endian stream of words, lowest bits first; 32 codes take ``b``
words, so codes of 3 bits straddle words and those of 2, 4 and 8 bits do not. ``qweight`` streams down the input
features, ``qzeros`` along the output features. Version 1 stores every zero point minus 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)
_RUN = 32  # codes that end on a word boundary, whatever their width


def words_for(count: int, bits: int) -> int:
    """Words that ``count`` codes take."""
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes along the first dimension.

    Args:
        codes: whole numbers below ``2^bits``, ``[count, columns]``.
        bits: 2, 3, 4 or 8.

    Returns:
        int32 ``[words_for(count, bits), columns]``; bits beyond the last code are 0.
    """
    count, columns = codes.shape
    runs = -(-count // _RUN)
    padded = torch.zeros((runs * _RUN, columns), dtype=torch.int32)
    padded[:count] = codes
    padded = padded.view(runs, _RUN, columns)
    words = torch.zeros((runs, bits, columns), dtype=torch.int32)
    for i in range(_RUN):
        word, shift = divmod(i * bits, 32)
        words[:, word] |= padded[:, i] << shift
        if shift + bits > 32:
            words[:, word + 1] |= padded[:, i] >> (32 - shift)
    return words.view(runs * bits, columns)[: words_for(count, bits)].contiguous()


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack`.

    Args:
        words: int32 ``[words_for(count, bits), columns]``.
        bits: 2, 3, 4 or 8.
        count: codes of a column.

    Returns:
        uint8 ``[count, columns]``.
    """
    runs, columns = -(-count // _RUN), words.shape[1]
    padded = torch.zeros((runs * bits, columns), dtype=torch.int32)
    padded[: words.shape[0]] = words
    padded = padded.view(runs, bits, columns)
    codes = torch.empty((runs, _RUN, columns), dtype=torch.uint8)
    mask = (1 << bits) - 1
    for i in range(_RUN):
        word, shift = divmod(i * bits, 32)
        # The shift of a negative word brings in ones from the left, which the masks take away.
        low = min(bits, 32 - shift)
        code = (padded[:, word] >> shift) & ((1 << low) - 1)
        if low < bits:
            code |= padded[:, word + 1] << low
        codes[:, i] = code & mask
    return codes.view(runs * _RUN, columns)[:count].contiguous()


def pack_zeros(zeros: Tensor, bits: int, version: int) -> Tensor:
    """``qzeros`` int32 ``[groups, words]`` of zero points uint8 ``[groups, out]``.

    Raises:
        ValueError: version 1 cannot hold a zero point of 0: readers do not agree on what its field means.
    """
    if version == 1:
        if bool((zeros == 0).any()):
            raise ValueError("a zero point is 0, which version 1 cannot store")
        zeros = zeros - 1
    return pack(zeros.t(), bits).t().contiguous()


def unpack_zeros(words: Tensor, bits: int, out_features: int, version: int, carries: bool = False) -> Tensor:
    """Zero points uint8 ``[groups, out]`` of ``qzeros`` int32 ``[groups, words]``.

    Args:
        words: as stored.
        bits: 2, 3, 4 or 8.
        out_features: fields that count.
        version: 1 stores them minus 1, 2 as they are.
        carries: version 1 was made by subtracting from whole words, as GPTQModel does at 2, 4 and 8 bits, so that a
            zero point of 0 borrowed from the next one; else a field of all ones is a zero point of 0.
    """
    if version == 1 and carries and bits != 3:
        ones = sum(1 << shift for shift in range(0, 32, bits))
        wide = (words.to(torch.int64) + ones) & 0xFFFFFFFF
        words = torch.where(wide >= 1 << 31, wide - (1 << 32), wide).to(torch.int32)
        version = 2
    zeros = unpack(words.t(), bits, out_features).t()
    return ((zeros + (version == 1)) & ((1 << bits) - 1)).contiguous()
