# SPDX-License-Identifier: Apache-2.0
"""Codes as bytes: what the 8-bit dot products of x86 and ARM take, made of the words that `words` packs.

A dot product takes 32-bit lanes of four unsigned bytes (codes; ARM's are signed) and four signed bytes (activations).
The words of a block give such lanes by a shift and an AND, because fields of 2, 4 and 8 bits repeat every byte. Of the
five pairs of 3-bit codes in a word four lie in bytes of their own once the upper bytes are moved by one bit; the others
are put together from several words. Which four codes share a lane follows from that: it is `order`, and activations are
stored in the same order.

A code need not be moved to the foot of its byte: sums of products with codes times 2**s are as exact, and a shift of
the sum makes up for a shift of every word. `free_shifts` says which vectors that saves an instruction.
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


@functools.cache
def order(bits: int) -> tuple[int, ...]:
    """The codes of a block in the order of the bytes of `byte_vectors`."""
    if bits == 3:
        own = [10 * word + at + pair for word in range(3) for at in (0, 2) for pair in (0, 6, 1, 7)]
        return (*own, 4, 14, 5, 15, 24, 30, 25, 31)
    starts = {field[0].shift: code for code, field in enumerate(fields(bits))}
    return tuple(starts[at + 8 * byte] for at in range(0, 8, bits) for byte in range(4))


def free_shifts(target: Target, bits: int) -> tuple[int, ...]:
    """For each vector of a block, how far left of the byte's foot its codes may stay; 0 is among them.

    AVX2 adds two products in 16 bits and ARM's bytes are signed, so that shifted codes stay below 128 there.
    """
    if bits == 3:
        return (0, 3) * 3 + (0, 0)
    most = 8 if width(target) == 16 else 7
    return tuple(at if at + bits <= most else 0 for at in range(0, 8, bits))


def byte_vectors(words: list[Expr], bits: int, lanes: int, shifts: tuple[int, ...]) -> list[Expr]:
    """The codes of a block, four to a lane of 32 bits, in the order of `order`.

    Args:
        words: the block's words, each a uint32 vector of ``lanes``.
        bits: 2, 3, 4 or 8.
        lanes: length of the vectors.
        shifts: each vector's codes are times 2**shift; zeros or `free_shifts`.
    """
    ir = script()

    def constant(value: int) -> Expr:
        return ir.Broadcast(ir.uint32(value), lanes)

    def moved(word: Expr, right: int) -> Expr:
        if right == 0:
            return word
        return word >> constant(right) if right > 0 else word << constant(-right)

    def by_bytes(even: Expr, odd: Expr) -> Expr:
        return (even & constant(0x00FF00FF)) | (odd & constant(0xFF00FF00))

    if bits == 8:
        return [words[0]]
    mask = ((1 << bits) - 1) * 0x01010101
    if bits != 3:
        places = zip(range(0, 8, bits), shifts, strict=True)
        return [moved(words[0], at - shift) & constant(mask << shift) for at, shift in places]
    found = []
    for word, shift in zip(words, shifts[1:6:2], strict=True):
        own = by_bytes(word, moved(word, 1))
        found += [own & constant(mask), moved(own, 3 - shift) & constant(mask << shift)]
    found.append(by_bytes(moved(words[0], 6), moved(words[1], -2)) & constant(mask))
    last = moved(words[2], 6) & constant(0x00070007)
    for bit, word in enumerate(words):
        last = last | (moved(word, 7 - bit) & constant(0x01000100 << bit))
    return [*found, last]


def width(target: Target) -> int:
    """32-bit lanes of the widest dot product of a target."""
    if target.is_arm:
        return 4
    return 16 if target.has("avx512vnni") else 8


def why_not(target: Target) -> Refusal | None:
    """Why there is no 8-bit dot product for a target, or None."""
    if target.has("dotprod") or target.has("avx2"):
        return None
    return Refusal("is for x86-64 processors with AVX2 or AVX-512 VNNI and for 64-bit ARM with dotprod")


def dot(target: Target, bits: int, total: Expr, codes: Expr, values: Expr) -> Expr:
    """``total`` + the sum of codes * values over the four bytes of each 32-bit lane, exactly.

    Args:
        target: decides between one instruction (vpdpbusd, sdot) and three.
        bits: of the codes, which are unsigned and may be times 2**`free_shifts`.
        total: int32 vector of `width` lanes. ``codes``: uint32. ``values``: int32, four int8 each within `LARGEST`.
    """
    ir = script()
    lanes = width(target)

    if lanes == 4:
        return _signed_dot(bits, total, codes, values)
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


def _signed_dot(bits: int, total: Expr, codes: Expr, values: Expr) -> Expr:
    """`dot` for ARM, whose instruction takes signed bytes: codes of 8 bits are their lower seven and the highest."""
    if bits < 8:
        return _sdot(total, codes, values)
    ir = script()

    def constant(value: int, dtype: str) -> Expr:
        return ir.Broadcast(getattr(ir, dtype)(value), 4)

    highest = (codes >> constant(7, "uint32")) & constant(0x01010101, "uint32")
    lower = _sdot(total, codes & constant(0x7F7F7F7F, "uint32"), values)
    return lower + (_sdot(constant(0, "int32"), highest, values) << constant(7, "int32"))


def _sdot(total: Expr, codes: Expr, values: Expr) -> Expr:
    """SDOT Vd.4S, Vn.16B, Vm.16B (ARM architecture reference manual, C7.2): four products of signed bytes a lane."""
    ir = script()
    parts = (ir.reinterpret("int8x16", part) for part in (codes, values))
    return ir.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.sdot.v4i32.v16i8", total, *parts)
