# SPDX-License-Identifier: Apache-2.0
"""CUDA text of `stream`: codes as subnormal halves, activations as they are, on mma.m16n8k16.

A code that is masked out of a half-word at bit t is the number code * 2**(t - 24), and tensor cores multiply it
exactly. A token is a column of the product.
"""

from __future__ import annotations

CONSTANTS = """
constexpr int NT = (M + 7) / 8, STRIDE = STAGED * 128 + 32, X_BYTES = M * STRIDE * 2, EACH = 4;
constexpr int PACK = 1, PAIRS = 4;
constexpr int ACCUMULATORS = RUN == 32 ? 4 : 2;
constexpr bool ONE = M == 1;
constexpr float UNIT_LOW = 1 << LOW, UNIT_HIGH = 1 << HIGH;
using Sum = float;
"""

TOKEN = "t * 8 + 2 * c + i % 2"

STORE = """  *reinterpret_cast<uint4*>(staged + j / PIECES * STRIDE + j % PIECES * 8) = v;
"""
STORE_NATURAL = """  // What a lane multiplies by two steps, the same word of four neighbouring pieces, comes to stand
  // together: it is read more often than written. A warp's lanes begin with different words, and so meet all banks.
  const bool one = j / 8 % 2, two = j / 16 % 2;
  const unsigned once[4] = {one ? v.y : v.x, one ? v.z : v.y, one ? v.w : v.z, one ? v.x : v.w};
  unsigned* to = reinterpret_cast<unsigned*>(staged + j / PIECES * STRIDE + j % PIECES / 4 * 32) + j % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) to[(i + one + 2 * two) % 4 * 4] = two ? once[(i + 2) % 4] : once[i];
"""

STAGE = """
// Stages eight of x as halves and adds them up across the lanes that hold a run.
__device__ __forceinline__ void stage(const float (*x)[8], int j, unsigned char* at, Sum* sums) {
  const uint4 v = make_uint4(gq_pair(x[0][0], x[0][1]), gq_pair(x[0][2], x[0][3]), gq_pair(x[0][4], x[0][5]),
                             gq_pair(x[0][6], x[0][7]));
  half* staged = reinterpret_cast<half*>(at);
  float s = 0.f;
  const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) { float2 f = gq_floats(words[i]); s += f.x + f.y; }
#pragma unroll
  for (int offset = RUN / 16; offset > 0; offset /= 2) s += __shfl_xor_sync(0xffffffffu, s, offset);
  if (j >= M * PIECES) return;
@STORE@  if (j % (RUN / 8) == 0) sums[j / PIECES * STAGED * RUNS + j % PIECES / (RUN / 8)] = HAS_ZEROS ? s : s * ZERO;
}

"""

OPERANDS = """
  constexpr int slot_of = 0;
  const half* rows[NT];
  const float* row_sums[2 * NT];
#pragma unroll
  for (int t = 0; t < NT; ++t) {
    rows[t] = reinterpret_cast<const half*>(staged) + (t * 8 + g < M ? t * 8 + g : M - 1) * STRIDE + 8 * c;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = t * 8 + 2 * c + i < M ? t * 8 + 2 * c + i : M - 1;
      row_sums[2 * t + i] = sums + column * STAGED * RUNS;
    }
  }

"""

MULTIPLY = """
        unsigned b[NT][2][8];
#pragma unroll
        for (int t = 0; t < NT; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            uint4 v = *reinterpret_cast<const uint4*>(rows[t] + (u + y) * 128 + i * 32);
            unsigned* to = &b[t][i / 2][i % 2 * 4];
            to[0] = v.x; to[1] = v.y; to[2] = v.z; to[3] = v.w;
          }
        float sum[ACCUMULATORS][R][NT][SETS][4] = {};
        unsigned a[2][R][4][4];
#pragma unroll
        for (int step = 0; step < 4; ++step)
#pragma unroll
          for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int r = 0; r < R; ++r) {
              if (step == 0) @FRAGMENTS@(a[h][r], words[y][h][r]);
#pragma unroll
              for (int t = 0; t < NT; ++t)
                gq_mma4(sum[RUN == 32 ? 2 * h + step / 2 : h][r][t][SETS == 2 ? step % 2 : 0],
                        a[h][r][step], b[t][h][2 * step], b[t][h][2 * step + 1]);
            }
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int run = 0; run < RUNS; ++run) {
            const float2 factor = gq_floats(scale[r][y * RUNS + run]);
            // Everything but the scale is in units of 2^-LOW and 2^-HIGH.
            const unsigned pair = HAS_ZEROS ? zero[r][HAS_ZEROS ? y * RUNS + run : 0] : 257u;
            const float zero_low = HAS_ZEROS ? float(pair & 255u) * (1.f / (1 << LOW)) : 1.f / (1 << LOW);
            const float zero_high = HAS_ZEROS ? float(pair >> 8) * (1.f / (1 << HIGH)) : 1.f / (1 << HIGH);
#pragma unroll
            for (int t = 0; t < NT; ++t)
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                if (ONE && i % 2) continue;
                float v = sum[run][r][t][0][i];
                if (RUN == 128) v += sum[1][r][t][0][i];
                if (SETS == 2) {
                  float odd = sum[run][r][t][SETS - 1][i];
                  if (RUN == 128) odd += sum[1][r][t][SETS - 1][i];
                  v += odd * (1.f / (1 << SECOND));
                }
                v -= (i < 2 ? zero_low : zero_high) * row_sums[2 * t + i % 2][(u + y) * RUNS + run];
                total[r][t][i] += v * (i < 2 ? factor.x : factor.y);
              }
          }
"""

BEFORE = ACCUMULATORS = ""
