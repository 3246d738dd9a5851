# SPDX-License-Identifier: Apache-2.0
"""CUDA instructions that TIR cannot say: wide loads, dequantization to half pairs, tensor-core multiply, warp sums.

Dequantization (Marlin; FasterTransformer): a field AND-ed out at bit s of both half-words and OR-ed with 0x6400 is the
half 1024 + code * 2**s, because a half in [1024, 2048) counts in steps of one. Multiplied by 2**-s, and with
1024 * 2**-s + zero subtracted, it is code - zero, all exact; one more multiplication applies the scale.
"""

from __future__ import annotations

from typing import Any

from gptq_compile.kernels.script import script
from gptq_compile.kernels.tvm_env import tvm
from gptq_compile.kernels.words import fields

Expr = Any

_LOADS = {
    words: f"""
__device__ __forceinline__ void gq_load{words}(unsigned* r, const void* p) {{
  {kind} v = __ldcs(reinterpret_cast<const {kind}*>(p));
  {body}
}}
"""
    for words, kind, body in (
        (1, "unsigned", "r[0] = v;"),
        (2, "uint2", "r[0] = v.x; r[1] = v.y;"),
        (4, "uint4", "r[0] = v.x; r[1] = v.y; r[2] = v.z; r[3] = v.w;"),
    )
}

_HALF8 = """
__device__ __forceinline__ void gq_half8(unsigned* r, const half* p, int count) {
  uint4 v = make_uint4(0u, 0u, 0u, 0u);
  if (count > 0) v = __ldg(reinterpret_cast<const uint4*>(p));
  r[0] = v.x; r[1] = v.y; r[2] = v.z; r[3] = v.w;
}
"""

_HALF8_TAIL = """
__device__ __forceinline__ void gq_half8_tail(unsigned* r, const half* p, int count) {
  const unsigned short* s = reinterpret_cast<const unsigned short*>(p);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    unsigned low = 2 * i < count ? s[2 * i] : 0u;
    unsigned high = 2 * i + 1 < count ? s[2 * i + 1] : 0u;
    r[i] = low | (high << 16);
  }
}
"""

_MMA = """
__device__ __forceinline__ void gq_mma(float* d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                       unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
"""

_WARP_SUM = """
__device__ __forceinline__ float gq_warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}
"""


def _dequant_source(bits: int, words: int) -> str:
    """Returns the function that turns `words` whole words (whole blocks) into half pairs in code order."""
    per_block = 3 if bits == 3 else 1
    table = fields(bits)
    lines: list[str] = []
    constants: set[int] = set()
    for base in range(0, words, per_block):
        shifted: dict[tuple[int, int], str] = {}
        for pair in range(len(table) // 2):
            out = base // per_block * (len(table) // 2) + pair
            parts = table[2 * pair]
            if len(parts) == 1:
                # Shift only as far as needed to bring the field below bit 10.
                shift = parts[0].shift
                step = 8 if bits != 3 else 9
                right = shift // step * step
                shift -= right
                word = f"w[{base + parts[0].word}]"
                if right:
                    name = f"w{base + parts[0].word}_{right}"
                    if (parts[0].word, right) not in shifted:
                        shifted[parts[0].word, right] = name
                        lines.append(f"unsigned {name} = {word} >> {right};")
                    word = name
                mask = (((1 << bits) - 1) << shift) * 0x10001
                value = f"({word} & 0x{mask:08x}u)"
            else:
                shift = 0
                bit = [f"((w[{base + p.word}] >> {p.shift - p.low}) & 0x{(1 << p.low) * 0x10001:08x}u)" for p in parts]
                value = "(" + " | ".join(bit) + ")"
            constants.add(shift)
            lines.append(f"out[{out}] = gq_affine{'' if shift else '0'}({value} | 0x64006400u, ")
            lines[-1] += f"{f'm{shift}, ' if shift else ''}z{shift}, s2);"
    setup = []
    for shift in sorted(constants):
        setup.append(f"unsigned z{shift} = (0x{0x6400 - (shift << 10):04x}u + (zero << {shift})) * 0x10001u;")
        if shift:
            setup.append(f"const unsigned m{shift} = 0x{(15 - shift) << 10:04x}u * 0x10001u;")
    body = "\n  ".join([*setup, *lines])
    return f"""
#ifndef GQ_AFFINE
#define GQ_AFFINE
__device__ __forceinline__ half2 gq_h2(unsigned v) {{ return *reinterpret_cast<half2*>(&v); }}
__device__ __forceinline__ unsigned gq_u(half2 v) {{ return *reinterpret_cast<unsigned*>(&v); }}
__device__ __forceinline__ unsigned gq_affine0(unsigned v, unsigned z, half2 s) {{
  return gq_u(__hmul2(__hsub2(gq_h2(v), gq_h2(z)), s));
}}
__device__ __forceinline__ unsigned gq_affine(unsigned v, unsigned m, unsigned z, half2 s) {{
  return gq_u(__hmul2(__hfma2(gq_h2(v), gq_h2(m), gq_h2(z ^ 0x80008000u)), s));
}}
#endif
__device__ __forceinline__ void gq_dequant{bits}_{words}(unsigned* out, const unsigned* w, half scale, unsigned zero) {{
  half2 s2 = __half2half2(scale);
  {body}
}}
"""


def _call(name: str, *args: Expr, source: str, returns: str = "void") -> Expr:
    return script().cuda.func_call(name, *args, source_code=source, return_type=returns)


def address(buffer: Any, *indices: Expr) -> Expr:
    """Returns the address of an element of a tensor."""
    return tvm.tirx.address_of(buffer[tuple(indices)])


def private_address(buffer: Any, at: int = 0) -> Expr:
    """Returns the address of element `at` of a private array, for a function that also touches elements after it.

    `address` would count as an access to that one element: TVM's CompactBufferAllocation then cuts the array off after
    the last element it saw, and nvcc drops what the function does beyond (seen on an H200). An access pointer names
    the whole array.
    """
    return buffer.access_ptr("rw", offset=at)


def load_words(count: int, target: Expr, source: Expr) -> None:
    """Emits a streaming load of 1, 2 or 4 words (aligned to their size) into registers."""
    script().evaluate(_call(f"gq_load{count}", target, source, source=_LOADS[count]))


def load_halves(target: Expr, source: Expr, count: Expr, aligned: bool) -> None:
    """Emits a load of eight halves as four words; elements from `count` on are zero and not read.

    With `aligned` the address is a multiple of 16 bytes and count is a multiple of eight (or negative).
    """
    name, text = ("gq_half8", _HALF8) if aligned else ("gq_half8_tail", _HALF8_TAIL)
    script().evaluate(_call(name, target, source, count, source=text))


def dequantize(bits: int, words: int, target: Expr, source: Expr, scale: Expr, zero: Expr) -> None:
    """Emits scale * (code - zero) as half pairs, in code order, of whole blocks in `words` words."""
    ir = script()
    ir.evaluate(
        _call(
            f"gq_dequant{bits}_{words}", target, source, scale, ir.cast(zero, "uint32"),
            source=_dequant_source(bits, words),
        )
    )  # fmt: skip


def mma(sums: Expr, a: tuple[Expr, Expr, Expr, Expr], b: tuple[Expr, Expr]) -> None:
    """Emits sums[0:4] += A[16, 16] @ B[16, 8], fragments as PTX lays out mma.m16n8k16."""
    script().evaluate(_call("gq_mma", sums, *a, *b, source=_MMA))


def warp_sum(value: Expr) -> Expr:
    """Returns the sum of `value` over the 32 lanes, in every lane."""
    return _call("gq_warp_sum", value, source=_WARP_SUM, returns="float32")


def barrier() -> None:
    """Emits ``__syncthreads()``."""
    ir = script()
    ir.evaluate(ir.tvm_storage_sync("shared"))
