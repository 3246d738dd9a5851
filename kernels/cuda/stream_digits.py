# SPDX-License-Identifier: Apache-2.0
"""CUDA text of `stream`: codes as 8-bit integers, activations as pairs of them, on mma.m16n8k32.

A word masked so that every byte keeps one code is a whole register of a fragment: four codes for one logic
instruction, where halves (`stream_halves`) take two, and half as many multiplications. Logic instructions are what
codes of two and three bits are short of: an ALU of Hopper starts one every other clock.

Activations of a run of codes (up to 128) become integers of 16 bits: x = v * 2**e with the largest e that the largest
of them allows, so that halves within 1 / 8 of it are exact and what else there is is rounded by up to 2**-15 of it. v
is high * 256 + low, both signed bytes, and columns 2m and 2m + 1 of a product are the low and the high digits of token
m: four tokens fill the eight columns of an instruction. Where there are fewer, units of a turn take columns of their
own: lanes whose columns are another unit's multiply zeros, and scales are applied once for up to four units, by all
lanes of a row. Sums of a run are exact: they begin at the bits of 1.5 * 2**23, so that the register is a float, too,
without a conversion (128 * 255 * 128 < 2**22).
"""

from __future__ import annotations

CONSTANTS = """
constexpr int NT = (M + 3) / 4, EACH = 2;
constexpr int STRIDE = STAGED * 128 + 16, ZEROS_AT = 2 * M * STRIDE, X_BYTES = ZEROS_AT + 32;
// Units that share the columns of a product, and pairs of columns that each of them has.
constexpr int PACK = M > 2 ? 1 : U % 2 ? 1 : M == 2 || U % 4 ? 2 : 4, PAIRS = 4 / PACK;
constexpr float UNIT_LOW = 1.f / (1 << BIT_LOW), UNIT_HIGH = 1.f / (1 << BIT_HIGH);
constexpr float ZERO_LOW = ZERO << BIT_LOW, ZERO_HIGH = ZERO << BIT_HIGH, MAGIC = 12582912.f;
struct alignas(8) Sum { float x, scale; };
"""

TOKEN = "t * 4 + c % PAIRS"

STORE = """
#pragma unroll
  for (int p = 0; p < SIDE; ++p) {
    unsigned low[2], high[2];
    // Bytes of a word: even k of the first and second pair, then odd k.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned even = __byte_perm(v[p][4 * i], v[p][4 * i + 2], 0x5140);
      const unsigned odd = __byte_perm(v[p][4 * i + 1], v[p][4 * i + 3], 0x5140);
      low[i] = __byte_perm(even, odd, 0x5410) ^ 0x80808080u;
      high[i] = __byte_perm(even, odd, 0x7632);
    }
    unsigned char* to = at + row * (2 * STRIDE) + place / 16 * 128 + (place + p) % 4 * 32 + place % 16 / 4 * 8;
    if (inside) {
      *reinterpret_cast<uint2*>(to) = make_uint2(low[0], low[1]);
      *reinterpret_cast<uint2*>(to + STRIDE) = make_uint2(high[0], high[1]);
    }
  }
"""
STORE_NATURAL = """
  unsigned char* to = at + row * (2 * STRIDE) + place / 16 * 128 + place % 16 / 8 * 16 + place % 8 / 2 * 4;
  // One piece is the k of one pair for four lanes, its neighbour those of the other pair. A thread with both makes all
  // four words, else two of them.
  const bool second = SIDE == 1 && place % 2;
#pragma unroll
  for (int i = 0; i < 2 * SIDE; ++i) {
    unsigned first_pair, second_pair;
    if constexpr (SIDE == 2) {
      first_pair = __byte_perm(v[0][2 * i], v[0][2 * i + 1], 0x5140);
      second_pair = __byte_perm(v[SIDE - 1][2 * i], v[SIDE - 1][2 * i + 1], 0x5140);
    } else {
      const unsigned mine = __byte_perm(v[0][2 * i], v[0][2 * i + 1], 0x5140);
      const unsigned other = __byte_perm(v[0][2 * i + 4], v[0][2 * i + 5], 0x5140);
      const unsigned got = __shfl_xor_sync(0xffffffffu, second ? mine : other, 1);
      const unsigned own = second ? other : mine;
      first_pair = second ? got : own;
      second_pair = second ? own : got;
    }
    if (inside) {
      unsigned char* word = to + (i + 2 * second) * 32;
      *reinterpret_cast<unsigned*>(word) = __byte_perm(first_pair, second_pair, 0x5140) ^ 0x80808080u;
      *reinterpret_cast<unsigned*>(word + STRIDE) = __byte_perm(first_pair, second_pair, 0x7362);
    }
  }
"""

STAGE = """
// Stages SIDE pieces of eight activations, from piece j on, as digits, and the sum and the unit of their run.
__device__ __forceinline__ void stage(const float (*x)[8], int j, unsigned char* at, Sum* sums) {
  constexpr int LANES = RUN / (8 * SIDE);  // that share a run
  if (j - int(threadIdx.x) % 32 * SIDE >= M * PIECES) return;
  const bool inside = j < M * PIECES;
  const unsigned row = M == 1 ? 0u : unsigned(j) / PIECES, place = M == 1 ? unsigned(j) : unsigned(j) % PIECES;
  float largest = 0.f;
#pragma unroll
  for (int p = 0; p < SIDE; ++p)
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = gq_largest(largest, x[p][i]);
#pragma unroll
  for (int offset = LANES / 2; offset > 0; offset /= 2)
    largest = gq_largest(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
  const unsigned most = gq_bits(largest) & 0x7fffffffu;
  // The exponent field of the largest, one more where it would be rounded to more than 32,639 = 127 * 256 + 127, the
  // largest integer of two digits: from 32,639.5 on.
  const unsigned exponent = max((most + 65792u) >> 23, 15u);
  const float factor = gq_float((268u - exponent) << 23);
  // Rounded to an integer in the low bits; 128 more is what makes the low digit signed.
  unsigned v[SIDE][8], s = 0u - 8u * SIDE * 0x4b400080u;
#pragma unroll
  for (int p = 0; p < SIDE; ++p) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      v[p][i] = gq_bits(x[p][i] * factor + (MAGIC + 128.f));
      s += v[p][i];
    }
  }
#pragma unroll
  for (int offset = LANES / 2; offset > 0; offset /= 2) s += __shfl_xor_sync(0xffffffffu, s, offset);
@STORE@
  // What is no number stays none.
  const float scale = most >= 0x7f800000u ? gq_float(0x7fc00000u) : gq_float((exponent - 14u) << 23);
  if (inside && j / SIDE % LANES == 0) sums[row * STAGED * RUNS + place / (RUN / 8)] = {float(int(s)), scale};
}
"""

BEFORE = """  if (threadIdx.x < 8) reinterpret_cast<unsigned*>(staged + ZEROS_AT)[threadIdx.x] = 0u;
"""

OPERANDS = """
  // Lane (g, c) feeds the column of digit g % 2 of one token and unit, and gets both digits of another.
  const int slot_of = c / PAIRS;
  const unsigned char* rows[NT][PACK];
  const Sum* row_sums[NT];
  int along[PACK];
  unsigned magic[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) magic[i] = 0x4b400000u;
#pragma unroll
  for (int t = 0; t < NT; ++t) {
    const int row = t * 8 + g % (2 * PAIRS);
#pragma unroll
    for (int p = 0; p < PACK; ++p) {
      const bool mine = PACK == 1 || g / (2 * PAIRS) == p;
      rows[t][p] = staged + (mine ? (row < 2 * M ? row : 2 * M - 1) * STRIDE + c * 32 : ZEROS_AT);
      along[p] = mine ? 128 : 0;
    }
    const int token = t * 4 + c % PAIRS;
    row_sums[t] = sums + (token < M ? token : M - 1) * STAGED * RUNS + slot_of * RUNS;
  }
"""

MULTIPLY = """
        unsigned b[NT][2][4];
#pragma unroll
        for (int t = 0; t < NT; ++t)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint4 v = *reinterpret_cast<const uint4*>(rows[t][y % PACK] + (u + y) * along[y % PACK] + h * 16);
            b[t][h][0] = v.x; b[t][h][1] = v.y; b[t][h][2] = v.z; b[t][h][3] = v.w;
          }
        unsigned a[2][R][2][4];
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int step = 0; step < 2; ++step)
#pragma unroll
            for (int r = 0; r < R; ++r) {
              if (step == 0) @BYTES@(a[h][r], words[y][h][r]);
              const int run = (2 * h + step) * RUNS / 4;
              const bool first = (2 * h + step) * RUNS % 4 == 0 && y % PACK == 0;
#pragma unroll
              for (int t = 0; t < NT; ++t)
                gq_mma_bytes(sum[run][r][t], a[h][r][step], b[t][h][2 * step], b[t][h][2 * step + 1],
                             first ? magic : sum[run][r][t]);
            }
        if (y % PACK != PACK - 1) continue;
#pragma unroll
        for (int t = 0; t < NT; ++t)
#pragma unroll
          for (int run = 0; run < RUNS; ++run) {
            const Sum of_x = row_sums[t][(u + y - PACK + 1) * RUNS + run];
#pragma unroll
            for (int r = 0; r < R; ++r) {
              const int grid = y / PACK * RUNS + run;
              const float2 factor = gq_floats(scale[r][grid]);
              const unsigned pair = HAS_ZEROS ? zero[r][HAS_ZEROS ? grid : 0] : 0u;
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

ACCUMULATORS = """
      unsigned sum[RUNS][R][NT][4];
"""
