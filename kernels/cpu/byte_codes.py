# SPDX-License-Identifier: Apache-2.0
"""Codes as bytes: what the 8-bit dot products of x86 take, made of the words that `words` packs.

A dot product takes 32-bit lanes of four unsigned bytes (codes) and four signed bytes (activations). The words of a
block give such lanes by a shift and an AND, because fields of 2, 4 and 8 bits repeat every byte; of 3 bits, by putting
two pairs of codes together that lie in the halves of two words. Which four codes share a lane follows from that: it
is `order`, and activations are stored in the same order.
"""

from __future__ import annotations

import functools
from typing import Any

from gptq_compile.kernels.registry import Refusal
from gptq_compile.kernels.script import script
from gptq_compile.kernels.target import Target
from gptq_compile.kernels.words import fields

Expr = Any

LARGEST = 127
"""Activations go from -127 to 127, so that two products with codes of 7 bits fit into 16."""
_PAIR_3 = tuple((j // 5, 3 * (j % 5)) for j in range(15))
"""Word and shift of the first fifteen pairs of a 3-bit block; bits 15 and 31 of the words are the last one."""


@functools.cache
def order(bits: int) -> tuple[int, ...]:
    """The codes of a block in the order of the bytes of `byte_vectors`."""
    if bits == 3:
        return tuple(code for v in range(8) for code in (4 * v, 4 * v + 2, 4 * v + 1, 4 * v + 3))
    starts = {field[0].shift: code for code, field in enumerate(fields(bits))}
    return tuple(starts[at + 8 * byte] for at in range(0, 8, bits) for byte in range(4))


def byte_vectors(words: list[Expr], bits: int, lanes: int) -> list[Expr]:
    """The codes of a block, four to a lane of 32 bits, in the order of `order`.

    Args:
        words: the block's words, each a uint32 vector of ``lanes``.
        bits: 2, 3, 4 or 8.
        lanes: length of the vectors.
    """
    ir = script()

    def constant(value: int) -> Expr:
        return ir.Broadcast(ir.uint32(value), lanes)

    def moved(word: Expr, right: int) -> Expr:
        if right == 0:
            return word
        return word >> constant(right) if right > 0 else word << constant(-right)

    if bits == 8:
        return [words[0]]
    if bits != 3:
        mask = ((1 << bits) - 1) * 0x01010101
        return [moved(words[0], at) & constant(mask) for at in range(0, 8, bits)]
    # Each vector: one pair in bytes 0 and 2, another one in bytes 1 and 3. The last pair is spread over the words.
    spread = [moved(word, 15 - at) & constant(0x00010001 << at) for at, word in enumerate(words)]
    last = spread[0] | spread[1] | spread[2]
    found = []
    for first in range(0, 16, 2):
        word, at = _PAIR_3[first]
        low, high = moved(words[word], at), last << constant(8)
        if first + 1 < len(_PAIR_3):
            word, at = _PAIR_3[first + 1]
            high = moved(words[word], at - 8)
        found.append(((low & constant(0x00FF00FF)) | (high & constant(0xFF00FF00))) & constant(0x07070707))
    return found


def width(target: Target) -> int:
    """32-bit lanes of the widest dot product of a target."""
    return 16 if target.has("avx512vnni") else 8


def why_not(target: Target) -> Refusal | None:
    """Why there is no 8-bit dot product for a target, or None."""
    return None if target.has("avx2") else Refusal("is for x86-64 processors with AVX2 or AVX-512 VNNI")


def dot(target: Target, bits: int, total: Expr, codes: Expr, values: Expr) -> Expr:
    """``total`` + the sum of codes * values over the four bytes of each 32-bit lane, exactly.

    Args:
        target: decides between one instruction (vpdpbusd) and three.
        bits: of the codes, which are unsigned.
        total: int32 vector of `width` lanes. ``codes``: uint32. ``values``: int32, four int8 each within `LARGEST`.
    """
    ir = script()
    lanes = width(target)

    if lanes == 16:
        parts = (ir.reinterpret("int8x64", part) for part in (codes, values))
        return ir.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.vpdpbusd.512", total, *parts)
    ones = {weight: ir.Broadcast(ir.int16(weight), 16) for weight in (1, 16)}

    def pairs(part: Expr, weight: int) -> Expr:
        parts = (ir.reinterpret("int8x32", part) for part in (part, values))
        sums = ir.call_llvm_pure_intrin("int16x16", "llvm.x86.avx2.pmadd.ub.sw", *parts)
        return ir.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", sums, ones[weight])

    if bits < 8:
        return total + pairs(codes, 1)
    # Sums of two products with 255 do not fit into 16 bits: the halves of the byte one after another.
    mask = ir.Broadcast(ir.uint32(0x0F0F0F0F), lanes)
    high = (codes >> ir.Broadcast(ir.uint32(4), lanes)) & mask
    return total + pairs(codes & mask, 1) + pairs(high, 16)
