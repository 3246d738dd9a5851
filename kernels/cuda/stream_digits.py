# SPDX-License-Identifier: Apache-2.0
"""CUDA text of `stream`: codes as 8-bit integers, activations as pairs of them, on mma.m16n8k32.

A word masked so that every byte keeps one code is a whole register of a fragment: four codes for one logic
instruction, where halves (`stream_halves`) take two, and half as many multiplications. Logic instructions are what
codes of two and three bits are short of: an ALU of Hopper starts one every other clock.

Activations of a run of codes (up to 128) become integers of 16 bits: x = v * 2**e with the largest e that the largest
of them allows, so that halves within 1 / 8 of it are exact and the others are rounded to 2**-15 of it. v is high * 256
+ low, both signed bytes, and columns 2m and 2m + 1 of a product are the low and the high digits of token m: four tokens
fill the eight columns of an instruction. Sums of a run are exact: they begin at the bits of 1.5 * 2**23, so that the
register is a float, too, without a conversion (128 * 255 * 128 < 2**22).
"""

from __future__ import annotations

CONSTANTS = """
constexpr int NT = (M + 3) / 4, STRIDE = STAGED * 128 + 16, X_BYTES = 2 * M * STRIDE, EACH = 2;
constexpr float UNIT_LOW = 1.f / (1 << BIT_LOW), UNIT_HIGH = 1.f / (1 << BIT_HIGH);
constexpr float ZERO_LOW = ZERO << BIT_LOW, ZERO_HIGH = ZERO << BIT_HIGH, MAGIC = 12582912.f;
struct alignas(8) Sum { float x, scale; };
"""

TOKEN = "t * 4 + c"

STORE = """
  unsigned char* to = at + j / PIECES * (2 * STRIDE) + unit * 128 + place % 4 * 32 + place / 4 * 8;
  *reinterpret_cast<uint2*>(to) = make_uint2(low[0], low[1]);
  *reinterpret_cast<uint2*>(to + STRIDE) = make_uint2(high[0], high[1]);
"""
STORE_NATURAL = """
  unsigned char* to = at + j / PIECES * (2 * STRIDE) + unit * 128 + place / 8 * 16 + place % 8 / 2 * 4 + place % 2 * 64;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    *reinterpret_cast<unsigned*>(to + i * 32) = low[i];
    *reinterpret_cast<unsigned*>(to + i * 32 + STRIDE) = high[i];
  }
"""
WORDS = """
  // Bytes of a word: even k of the first and second pair, then odd k.
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned even = __byte_perm(v[4 * i], v[4 * i + 2], 0x5140);
    const unsigned odd = __byte_perm(v[4 * i + 1], v[4 * i + 3], 0x5140);
    low[i] = __byte_perm(even, odd, 0x5410) ^ 0x80808080u;
    high[i] = __byte_perm(even, odd, 0x7632);
  }
"""
WORDS_NATURAL = """
  // This thread has the k of one pair for four lanes, its neighbour those of the other pair; each makes two words.
  const bool second = j % 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned mine = __byte_perm(v[2 * i], v[2 * i + 1], 0x5140);
    const unsigned other = __byte_perm(v[2 * i + 4], v[2 * i + 5], 0x5140);
    const unsigned got = __shfl_xor_sync(0xffffffffu, second ? mine : other, 1);
    const unsigned own = second ? other : mine, first_pair = second ? got : own, second_pair = second ? own : got;
    low[i] = __byte_perm(first_pair, second_pair, 0x5140) ^ 0x80808080u;
    high[i] = __byte_perm(first_pair, second_pair, 0x7362);
  }
"""

STAGE = """
// Stages eight halves of x as digits, and the sum and the unit of their run.
__device__ __forceinline__ void stage(uint4 x, int j, unsigned char* at, Sum* sums) {
  const unsigned words[4] = {x.x, x.y, x.z, x.w};
  unsigned most = 0u;
#pragma unroll
  for (int i = 0; i < 4; ++i) most = max(most, max(words[i] & 0x7fffu, words[i] >> 16 & 0x7fffu));
#pragma unroll
  for (int offset = RUN / 16; offset > 0; offset /= 2)
    most = max(most, (unsigned)__shfl_xor_sync(0xffffffffu, (int)most, offset));
  // The exponent field of the largest: 32,639 = 127 * 256 + 127 is the largest integer of two digits.
  const unsigned exponent = max((most + 8u) >> 10, 1u);
  const float factor = gq_float((156u - exponent) << 23);
  unsigned v[8], low[2], high[2];
  float s = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 f = gq_floats(words[i]);
    // Rounded to an integer in the low bits; 128 more is what makes the low digit signed.
    const float first = f.x * factor + (MAGIC + 128.f), second = f.y * factor + (MAGIC + 128.f);
    v[2 * i] = gq_bits(first);
    v[2 * i + 1] = gq_bits(second);
    s += (first - (MAGIC + 128.f)) + (second - (MAGIC + 128.f));
  }
#pragma unroll
  for (int offset = RUN / 16; offset > 0; offset /= 2) s += __shfl_xor_sync(0xffffffffu, s, offset);
@WORDS@
  if (j >= M * PIECES) return;
  const int unit = j % PIECES / 16, place = j % 16;
@STORE@
  // What is no number stays none.
  const float scale = most >= 0x7c00u ? gq_float(0x7fc00000u) : gq_float((98u + exponent) << 23);
  if (j % (RUN / 8) == 0) sums[j / PIECES * STAGED * RUNS + j % PIECES / (RUN / 8)] = {s, scale};
}
"""

OPERANDS = """
  const unsigned char* rows[NT];
  const Sum* row_sums[NT];
  unsigned magic[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) magic[i] = gq_kept(0x4b400000u);
#pragma unroll
  for (int t = 0; t < NT; ++t) {
    rows[t] = staged + (t * 8 + g < 2 * M ? t * 8 + g : 2 * M - 1) * STRIDE + c * 32;
    row_sums[t] = sums + (t * 4 + c < M ? t * 4 + c : M - 1) * STAGED * RUNS;
  }
"""

MULTIPLY = """
        unsigned b[NT][2][4];
#pragma unroll
        for (int t = 0; t < NT; ++t)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint4 v = *reinterpret_cast<const uint4*>(rows[t] + (u + y) * 128 + h * 16);
            b[t][h][0] = v.x; b[t][h][1] = v.y; b[t][h][2] = v.z; b[t][h][3] = v.w;
          }
        unsigned sum[RUNS][R][NT][4], a[2][R][2][4];
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int step = 0; step < 2; ++step)
#pragma unroll
            for (int r = 0; r < R; ++r) {
              if (step == 0) @BYTES@(a[h][r], words[y][h][r]);
              const int run = (2 * h + step) * RUNS / 4;
              const bool first = (2 * h + step) * RUNS % 4 == 0;
#pragma unroll
              for (int t = 0; t < NT; ++t)
                gq_mma_bytes(sum[run][r][t], a[h][r][step], b[t][h][2 * step], b[t][h][2 * step + 1],
                             first ? magic : sum[run][r][t]);
            }
#pragma unroll
        for (int t = 0; t < NT; ++t)
#pragma unroll
          for (int run = 0; run < RUNS; ++run) {
            const Sum of_x = row_sums[t][(u + y) * RUNS + run];
#pragma unroll
            for (int r = 0; r < R; ++r) {
              const float2 factor = gq_floats(scale[r][y * RUNS + run]);
              const unsigned pair = HAS_ZEROS ? zero[r][HAS_ZEROS ? y * RUNS + run : 0] : 0u;
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                const float zero_of = HAS_ZEROS ? float((i ? pair >> 8 : pair & 255u) << (i ? BIT_HIGH : BIT_LOW))
                                                : (i ? ZERO_HIGH : ZERO_LOW);
                const unsigned* digits = sum[run][r][t] + 2 * i;
                const float v = (gq_float(digits[1]) - MAGIC) * 256.f + (gq_float(digits[0]) - MAGIC);
                total[r][t][i] += (v - zero_of * of_x.x) * ((i ? factor.y : factor.x) * of_x.scale);
              }
            }
          }
"""
