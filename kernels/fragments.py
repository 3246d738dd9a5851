# SPDX-License-Identifier: Apache-2.0
"""How b-bit codes sit in the words that tensor cores multiply: tiles of 16 weight rows x 64 k, lane by lane.

mma.m16n8k16 wants from lane (g, c) = (lane / 4, lane % 4) pairs of neighbouring k of the rows g and g + 8. A tile holds
the codes of four such steps in exactly the words of the lane that needs them, so a warp reads a tile with coalesced
loads and nothing is exchanged. The order of k is free as long as activations follow it: steps 2p and 2p + 1 of lane c
stand for the eight k from 32p + 8c on, so activations are read 16 bytes at a time and groups of any multiple of 32
codes begin and end between steps. In the other, `natural` order step s stands for the sixteen k from 16s on, as wgmma
reads them where activations were copied to shared memory as they are.

Two ways of taking codes out of words want the same of their places. A code that stands at bit s of a half-word, with
the other bits masked away, *is* the half code * 2**(s - 24): a subnormal number, which tensor cores multiply exactly.
And a word in which every byte keeps one code, at the same bit, is four 8-bit integers of a fragment of mma.m16n8k32,
times a power of two. So codes never cross a byte, and there is one bit for a step's rows below 8 and one for the
others; powers of two are put back with the scale, in float32.

Bits of the 32 codes of a lane, one half-word each (even k low, odd k high), the first pair of a step in the low byte,
the second in the high one:

* 4: word = step; row g at bit 0 of the byte, row g + 8 at 4.
* 8: words 2 step (row g) and 2 step + 1 (row g + 8).
* 2: word = step / 2; row g at 0, row g + 8 at 2; odd steps 4 bits higher.
* 3: words 0-2 hold steps 0-2: row g at 2, row g + 8 at 5. Step 3 is in the two bits below: the low two bits of row g
  in word 0, of row g + 8 in word 1, and the third bits of both in word 2.
"""

from __future__ import annotations

import functools

import numpy as np

from gptq_compile.kernels.words import Field, Grouping

TILE_ROWS = 16
TILE_CODES = 64
LANES = 32
STEPS = 4
VECTOR = {2: 2, 3: 1, 4: 4, 8: 4}
"""Words a lane reads at once: vectors of all lanes follow each other."""


def why_not(grouping: Grouping) -> str | None:
    """Returns why rows grouped like this cannot be cut into tiles, or None."""
    if grouping.in_features % 8:
        return f"needs in_features to be a multiple of 8, not {grouping.in_features}"
    if grouping.groups > 1 and grouping.group_size % 32:
        return f"needs groups of a multiple of 32 codes, not {grouping.group_size}"
    return None


def chunks(in_features: int) -> int:
    """Returns the tiles along K; the last is padded with zero codes."""
    return -(-in_features // TILE_CODES)


@functools.cache
def lane_fields(bits: int) -> tuple[tuple[Field, ...], ...]:
    """Returns where the 32 codes of a lane are, ordered by (step, row g or g + 8, pair, even or odd)."""
    found: list[tuple[Field, ...]] = []
    for step in range(STEPS):
        for high in (0, 1):
            for pair in (0, 1):
                for odd in (0, 1):
                    parts = _place(bits, step, high, pair)
                    found.append(tuple(Field(word, shift + 16 * odd, width, low) for word, shift, width, low in parts))
    return tuple(found)


def _place(bits: int, step: int, high: int, pair: int) -> list[tuple[int, int, int, int]]:
    """Returns (word, bit of the half-word, width, lowest bit of the code) of the parts of a code."""
    if bits == 8:
        return [(2 * step + high, 8 * pair, 8, 0)]
    if bits == 4:
        return [(step, 4 * high + 8 * pair, 4, 0)]
    if bits == 2:
        return [(step // 2, 4 * (step % 2) + 2 * high + 8 * pair, 2, 0)]
    if step < 3:
        return [(step, 2 + 3 * high + 8 * pair, 3, 0)]
    return [(high, 8 * pair, 2, 0), (2, high + 8 * pair, 1, 2)]


def encode(bits: int, codes: np.ndarray, natural: bool = False) -> np.ndarray:
    """Packs codes u8 [N, K] to u32 [ceil(N / 16), ceil(K / 64), 32 * bits]; padding codes are zero."""
    rows, columns = codes.shape
    padded = np.pad(codes, [(0, -rows % TILE_ROWS), (0, -columns % TILE_CODES)])
    tiles, across = padded.shape[0] // TILE_ROWS, padded.shape[1] // TILE_CODES
    if natural:
        # Rows are (high, g); k is (step, pair, c, odd).
        split = padded.reshape(tiles, 2, 8, across, STEPS, 2, 4, 2).transpose(0, 3, 4, 1, 5, 7, 2, 6)
    else:
        # k is (step / 2, c, step % 2, pair, odd).
        split = padded.reshape(tiles, 2, 8, across, 2, 4, 2, 2, 2).transpose(0, 3, 4, 6, 1, 7, 8, 2, 5)
    lanes = split.reshape(tiles, across, 32, LANES)
    words = np.zeros((tiles, across, bits, LANES), np.uint32)
    for j, parts in enumerate(lane_fields(bits)):
        for part in parts:
            value = (lanes[:, :, j] >> part.low) & ((1 << part.width) - 1)
            words[:, :, part.word] |= value.astype(np.uint32) << np.uint32(part.shift)
    width = VECTOR[bits]
    vectors = words.reshape(tiles, across, bits // width, width, LANES).swapaxes(3, 4)
    return np.ascontiguousarray(vectors).reshape(tiles, across, bits * LANES)


def decode(bits: int, words: np.ndarray, rows: int, columns: int, natural: bool = False) -> np.ndarray:
    """Unpacks to codes u8 [rows, columns]: the inverse of `encode`."""
    tiles, across = words.shape[:2]
    width = VECTOR[bits]
    vectors = words.reshape(tiles, across, bits // width, LANES, width)
    planes = vectors.swapaxes(3, 4).reshape(tiles, across, bits, LANES)
    lanes = np.zeros((tiles, across, 32, LANES), np.uint8)
    for j, parts in enumerate(lane_fields(bits)):
        for part in parts:
            value = (planes[:, :, part.word] >> np.uint32(part.shift)) & np.uint32((1 << part.width) - 1)
            lanes[:, :, j] |= (value << np.uint32(part.low)).astype(np.uint8)
    if natural:
        split = lanes.reshape(tiles, across, STEPS, 2, 2, 2, 8, 4).transpose(0, 3, 6, 1, 2, 4, 7, 5)
    else:
        split = lanes.reshape(tiles, across, 2, 2, 2, 2, 2, 8, 4).transpose(0, 4, 7, 1, 2, 8, 3, 5, 6)
    return np.ascontiguousarray(split.reshape(tiles * TILE_ROWS, across * TILE_CODES)[:rows, :columns])


def encode_grid(grid: np.ndarray) -> np.ndarray:
    """Arranges scales or zero points [N, G] as [ceil(N / 16), G, 8, 2], rows g and g + 8 side by side."""
    rows, groups = grid.shape
    padded = np.pad(grid, [(0, -rows % TILE_ROWS), (0, 0)])
    return np.ascontiguousarray(padded.reshape(-1, 2, 8, groups).transpose(0, 3, 2, 1))


def decode_grid(tiles: np.ndarray, rows: int) -> np.ndarray:
    """Returns [rows, G]: the inverse of `encode_grid`."""
    return np.ascontiguousarray(tiles.transpose(0, 3, 2, 1).reshape(-1, tiles.shape[1])[:rows])
