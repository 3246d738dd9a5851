# SPDX-License-Identifier: Apache-2.0
"""How b-bit codes sit in 32-bit words; every packed layout and every kernel shares this one encoding.

A *block* is the smallest run of codes that fills whole words:

* 2, 4, 8 bits: 16, 8, 4 codes in one word. Code 2i sits at bit b*i of the low half-word and code 2i+1 at bit b*i of
  the high half-word, so that one AND yields a pair of neighbours in the two halves of a ``half2`` (the interleave of
  FasterTransformer and Marlin).
* 3 bits: 32 codes in three words, no bit lost. Word w holds codes 10w..10w+9 as five such pairs in bits 0-14 and
  16-30; the bits 15 of the three words are code 30 (bit w of the code in word w), the bits 31 code 31 (exllamav2's
  idea).

Groups never share a word: a group's codes are padded with zeros to whole blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Field:
    """Where a code (or a bit of it) sits: bits [shift, shift+width) of word `word` are its bits from `low` up."""

    word: int
    shift: int
    width: int
    low: int


@dataclass(frozen=True)
class Grouping:
    """The words of one weight row.

    Attributes:
        bits: 2, 3, 4 or 8.
        in_features: K.
        group_size: codes of a full group, 1..K.
        groups: number of groups, the last may be short.
        group_words: words of a full group.
        row_words: words of the row: full groups, then the last group without padding beyond its own blocks.
    """

    bits: int
    in_features: int
    group_size: int
    groups: int
    group_words: int
    row_words: int

    @staticmethod
    def of(bits: int, in_features: int, group_size: int) -> Grouping:
        """Resolves ``group_size`` -1 (one group) and larger-than-K values.

        Raises:
            ValueError: if bits is not 2, 3, 4 or 8, or a size is not positive.
        """
        if bits not in BITS:
            raise ValueError(f"Codes of {bits} bits cannot be packed. Use 2, 3, 4 or 8.")
        if in_features < 1 or (group_size < 1 and group_size != -1):
            raise ValueError(
                f"in_features={in_features} and group_size={group_size} must be positive (group_size may be -1)."
            )
        size = in_features if group_size == -1 else min(group_size, in_features)
        groups = -(-in_features // size)
        last = in_features - (groups - 1) * size
        full = words_for(bits, size)
        return Grouping(bits, in_features, size, groups, full, (groups - 1) * full + words_for(bits, last))

    @property
    def last_size(self) -> int:
        """Codes of the last group."""
        return self.in_features - (self.groups - 1) * self.group_size

    @property
    def dense(self) -> bool:
        """True when no group but the last is padded, so that code k sits in block k // block_codes."""
        return self.groups == 1 or self.group_size % block_codes(self.bits) == 0


def block_codes(bits: int) -> int:
    """Returns the codes of one block."""
    return 32 if bits == 3 else 32 // bits


def block_words(bits: int) -> int:
    """Returns the words of one block."""
    return 3 if bits == 3 else 1


def words_for(bits: int, codes: int) -> int:
    """Returns the words of `codes` codes that start a block."""
    return -(-codes // block_codes(bits)) * block_words(bits)


def fields(bits: int) -> tuple[tuple[Field, ...], ...]:
    """Returns, for each code of a block, the fields that make it up (one, or three single bits)."""
    if bits != 3:
        return tuple((Field(0, bits * (j // 2) + 16 * (j % 2), bits, 0),) for j in range(32 // bits))
    pairs = tuple((Field(j // 10, 3 * (j % 10 // 2) + 16 * (j % 2), 3, 0),) for j in range(30))
    spread = tuple(tuple(Field(w, 15 + 16 * j, 1, w) for w in range(3)) for j in range(2))
    return pairs + spread


def encode(bits: int, codes: np.ndarray) -> np.ndarray:
    """Packs whole blocks.

    Args:
        bits: 2, 3, 4 or 8.
        codes: u8 [..., n], n a multiple of `block_codes`, every value below 2**bits.

    Returns:
        u32 [..., n / block_codes * block_words].
    """
    lead, count = codes.shape[:-1], codes.shape[-1] // block_codes(bits)
    blocks = codes.reshape(*lead, count, block_codes(bits)).astype(np.uint32)
    words = np.zeros((*blocks.shape[:-1], block_words(bits)), np.uint32)
    for j, parts in enumerate(fields(bits)):
        for part in parts:
            value = (blocks[..., j] >> np.uint32(part.low)) & np.uint32((1 << part.width) - 1)
            words[..., part.word] |= value << np.uint32(part.shift)
    return words.reshape(*lead, count * block_words(bits))


def decode(bits: int, words: np.ndarray) -> np.ndarray:
    """Unpacks whole blocks: the inverse of `encode`."""
    lead, count = words.shape[:-1], words.shape[-1] // block_words(bits)
    blocks = words.reshape(*lead, count, block_words(bits))
    codes = np.zeros((*blocks.shape[:-1], block_codes(bits)), np.uint8)
    for j, parts in enumerate(fields(bits)):
        for part in parts:
            value = (blocks[..., part.word] >> np.uint32(part.shift)) & np.uint32((1 << part.width) - 1)
            codes[..., j] |= (value << np.uint32(part.low)).astype(np.uint8)
    return codes.reshape(*lead, count * block_codes(bits))


def encode_rows(grouping: Grouping, codes: np.ndarray) -> np.ndarray:
    """Packs codes u8 [N, K] to u32 [N, row_words], each group padded to whole blocks."""
    rows = codes.shape[0]
    full, size = grouping.groups - 1, grouping.group_size
    per_block = block_codes(grouping.bits)

    def padded(part: np.ndarray) -> np.ndarray:
        width = [(0, 0)] * (part.ndim - 1) + [(0, -part.shape[-1] % per_block)]
        return encode(grouping.bits, np.pad(part, width))

    head = padded(codes[:, : full * size].reshape(rows, full, size)).reshape(rows, full * grouping.group_words)
    return np.concatenate([head, padded(codes[:, full * size :])], axis=1)


def decode_rows(grouping: Grouping, words: np.ndarray) -> np.ndarray:
    """Unpacks u32 [N, row_words] to codes u8 [N, K]: the inverse of `encode_rows`."""
    rows = words.shape[0]
    full, size, per_group = grouping.groups - 1, grouping.group_size, grouping.group_words
    head = decode(grouping.bits, words[:, : full * per_group].reshape(rows, full, per_group))[..., :size]
    tail = decode(grouping.bits, words[:, full * per_group :])[:, : grouping.last_size]
    return np.concatenate([head.reshape(rows, full * size), tail], axis=1)
