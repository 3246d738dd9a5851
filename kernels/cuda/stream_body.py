# SPDX-License-Identifier: Apache-2.0
"""The CUDA text of the stream kernel (see `stream`, which fills in what stands between @ signs)."""

from __future__ import annotations

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

BODY = """
constexpr int THREADS = T * S * 32, RUNS = 128 / RUN, NT = (M + 7) / 8, STRIDE = STAGED * 128 + 32;
constexpr int ACCUMULATORS = RUN == 32 ? 4 : 2;
constexpr bool ONE = M == 1, HAS_ZEROS = @HAS_ZEROS@, DEPENDENT = @DEPENDENT@;
constexpr int SUPERS = (TILES + R - 1) / R;
constexpr int PIECES = STAGED * 16, HELD = (M * PIECES + THREADS - 1) / THREADS;
constexpr int TURN = U * BITS * 256, GRIDS = R * U * RUNS, SCALE_AT = R * TURN, ZERO_AT = SCALE_AT + GRIDS * 32;
constexpr int X_AT = T * S * D * SLOT, SUMS_AT = X_AT + M * STRIDE * 2;
constexpr int SCRATCH_AT = SUMS_AT + (M * STAGED * RUNS * 4 + 15) / 16 * 16, PARTIAL_AT = SCRATCH_AT + SCRATCH;

@INPUT@
// Stages sixteen bytes of x and adds up the codes of a run across the lanes that hold it.
__device__ __forceinline__ void stage(uint4 v, int j, half* staged, float* sums) {
  float s = 0.f;
  const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) { float2 f = gq_floats(words[i]); s += f.x + f.y; }
#pragma unroll
  for (int offset = RUN / 16; offset > 0; offset /= 2) s += __shfl_xor_sync(0xffffffffu, s, offset);
  if (j >= M * PIECES) return;
@STORE@  if (j % (RUN / 8) == 0) sums[j / PIECES * STAGED * RUNS + j % PIECES / (RUN / 8)] = HAS_ZEROS ? s : s * ZERO;
}

__device__ __forceinline__ void run(@SOURCE@const unsigned* __restrict__ q, const half* __restrict__ scales,
                                    @ZEROS@@BIAS@@RESIDUAL@@OUT@* __restrict__ out, unsigned char* shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int part = warp / S, split = warp % S, blocks = gridDim.x;
  unsigned char* ring = shared + warp * D * SLOT;
  half* staged = reinterpret_cast<half*>(shared + X_AT);
  float* sums = reinterpret_cast<float*>(shared + SUMS_AT);
  float* partial = reinterpret_cast<float*>(shared + PARTIAL_AT);
  const unsigned char* zero_points = (const unsigned char*)@ZEROS_POINTER@;

  const Source origin = {@ARGUMENTS@};
  constexpr bool KEPT = HELD <= MOST_HELD;
  Before before_held[KEPT ? HELD : 1];
  Held held[KEPT ? HELD : 1];
  Row statistics_of[STATISTICS ? M : 1];
  @LET_NEXT_START@
  if constexpr (KEPT) {
#pragma unroll
    for (int i = 0; i < HELD; ++i) before(before_held[i], origin, i * THREADS + threadIdx.x);
    // The activations' loads go first, or they would queue behind the weights; but not before they are there.
    if constexpr (!DEPENDENT) {
#pragma unroll
      for (int i = 0; i < HELD; ++i) take(held[i], origin, i * THREADS + threadIdx.x);
    }
  }

  int next = blockIdx.x + blocks * part, unit = split * U, slot = 0;
  // Where this lane's pieces begin: of the weights, and of the scales (lanes 0-15) or zero points of the tiles.
  constexpr int GRID_TURNS = (2 * GRIDS + 15) / 16;
  const char *from[R], *grid[GRID_TURNS];
  const bool is_zero = HAS_ZEROS && lane >= 16;
  auto aim = [&]() {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const long long tile = TILES % R && next * R + r >= TILES ? TILES - 1 : next * R + r;
      from[r] = reinterpret_cast<const char*>(q) + tile * (CHUNKS * BITS * 128) + unit * (BITS * 256) + lane * 16;
    }
#pragma unroll
    for (int i = 0; i < GRID_TURNS; ++i) {
      const int mine = is_zero ? i * 16 + lane - 16 : i * 8 + lane % 16 / 2, r = mine / (U * RUNS);
      const long long tile = TILES % R && next * R + r >= TILES ? TILES - 1 : next * R + (r < R ? r : 0);
      grid[i] = is_zero ? reinterpret_cast<const char*>(zero_points) + tile * (GROUPS * 16)
                        : reinterpret_cast<const char*>(scales) + tile * (GROUPS * 32) + lane % 2 * 16;
    }
  };
  aim();
  auto fetch = [&]() {
    if (next < SUPERS) {
      unsigned char* to = ring + slot * SLOT;
      constexpr bool WHOLE = CHUNKS % (2 * U) == 0 && TURN % 512 == 0;
      const int left = WHOLE ? TURN : min((CHUNKS - 2 * unit) * (BITS * 128), TURN);
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int at = 0; at < TURN; at += 512)
          if (WHOLE || at + lane * 16 < left) gq_copy16(to + r * TURN + at + lane * 16, from[r] + at);
        from[r] += S * TURN;
      }
#pragma unroll
      for (int i = 0; i < GRID_TURNS; ++i) {
        const int mine = is_zero ? i * 16 + lane - 16 : i * 8 + lane % 16 / 2;
        const int first = unit * 128 + mine % (U * RUNS) * RUN;
        const int group = GROUPS == 1 ? 0 : first / GROUP < GROUPS ? first / GROUP : GROUPS - 1;
        if (mine < GRIDS && (HAS_ZEROS || lane < 16))
          gq_copy16(to + (is_zero ? ZERO_AT + mine * 16 : SCALE_AT + i * 256 + lane * 16),
                    grid[i] + group * (is_zero ? 16 : 32));
      }
      unit += S * U;
      if (unit >= UNITS) { unit = split * U; next += blocks * T; aim(); }
    }
    gq_commit();
    slot = slot + 1 == D ? 0 : slot + 1;
  };
#pragma unroll
  for (int i = 0; i < EARLY; ++i) fetch();

  @WAIT_FOR_PREVIOUS@
  if constexpr (KEPT) {
    if constexpr (DEPENDENT) {
#pragma unroll
      for (int i = 0; i < HELD; ++i) take(held[i], origin, i * THREADS + threadIdx.x);
    }
#pragma unroll
    for (int i = EARLY; i < D - 1; ++i) fetch();
    if constexpr (STATISTICS) statistics<HELD>(statistics_of, held, reinterpret_cast<float*>(shared + SCRATCH_AT));
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int j = i * THREADS + threadIdx.x;
      stage(finish(held[i], before_held[i], statistics_of, j), j, staged, sums);
    }
  } else {
    // As many loads at once as there is room for: each turn takes as long as one of them.
#pragma unroll 1
    for (int first = 0; first < HELD; first += MOST_HELD) {
      Held some[MOST_HELD];
#pragma unroll
      for (int i = 0; i < MOST_HELD; ++i) take(some[i], origin, (first + i) * THREADS + threadIdx.x);
      if (first == 0) {
#pragma unroll
        for (int i = EARLY; i < D - 1; ++i) fetch();
      }
#pragma unroll
      for (int i = 0; i < MOST_HELD; ++i) {
        const int j = (first + i) * THREADS + threadIdx.x;
        stage(finish(some[i], before_held[0], statistics_of, j), j, staged, sums);
      }
    }
  }
  __syncthreads();

  const half* rows[NT];
  const float* row_sums[2 * NT];
#pragma unroll
  for (int t = 0; t < NT; ++t) {
    rows[t] = staged + (t * 8 + g < M ? t * 8 + g : M - 1) * STRIDE + 8 * c;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = t * 8 + 2 * c + i < M ? t * 8 + 2 * c + i : M - 1;
      row_sums[2 * t + i] = sums + column * STAGED * RUNS;
    }
  }

  int use = 0, parity = 0;
#pragma unroll 1
  for (int super = blockIdx.x + blocks * part; super < SUPERS; super += blocks * T) {
    float total[R][NT][4] = {};
#pragma unroll 1
    for (int u = split * U; u < UNITS; u += S * U) {
      gq_wait<D - 2>();
      __syncwarp();
      const unsigned char* data = ring + use * SLOT;
      use = use + 1 == D ? 0 : use + 1;
      unsigned words[U][2][R][BITS], scale[R][U * RUNS], zero[R][HAS_ZEROS ? U * RUNS : 1];
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int h = 0; h < 2 * U; ++h)
          gq_words<BITS, true>(words[h / 2][h % 2][r],
                               reinterpret_cast<const unsigned*>(data + r * TURN + h * BITS * 128), lane);
#pragma unroll
        for (int run = 0; run < U * RUNS; ++run) {
          const int at = r * U * RUNS + run;
          scale[r][run] = *reinterpret_cast<const unsigned*>(data + SCALE_AT + at * 32 + g * 4);
          if constexpr (HAS_ZEROS)
            zero[r][run] = *reinterpret_cast<const unsigned short*>(data + ZERO_AT + at * 16 + g * 2);
        }
      }
      // Into the slot of the turn before, which every lane has read before the barrier above.
      fetch();

#pragma unroll
      for (int y = 0; y < U; ++y) {
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
      }
    }
#pragma unroll
    for (int i = 0; i < R * NT * 4; ++i) total[i / (4 * NT)][i / 4 % NT][i % 4] *= float(1 << (i % 4 < 2 ? LOW : HIGH));
    auto put = [&](int m, int row, float v) {
      if (m < M && row < N) {
        @ADD_BIAS@
        @ADD_RESIDUAL@
        out[(long long)m * N + row] = (@OUT@)v;
      }
    };
    if constexpr (S == 1) {
#pragma unroll
      for (int i = 0; i < R * NT * 4; ++i) {
        const int column = i / 4 % NT * 8 + 2 * c + i % 2, row = i / (4 * NT) * 16 + g + i % 4 / 2 * 8;
        put(column, super * R * 16 + row, total[i / (4 * NT)][i / 4 % NT][i % 4]);
      }
    } else {
      float* mine = partial + ((parity * T + part) * S) * R * 16 * COLUMNS;
#pragma unroll
      for (int i = 0; i < R * NT * 4; ++i) {
        const int column = i / 4 % NT * 8 + 2 * c + i % 2, row = i / (4 * NT) * 16 + g + i % 4 / 2 * 8;
        const float v = total[i / (4 * NT)][i / 4 % NT][i % 4];
        if (column < COLUMNS) mine[(split * R * 16 + row) * COLUMNS + column] = v;
      }
      gq_barrier(part + 1, S * 32);
      for (int j = split * 32 + lane; j < R * 16 * M; j += S * 32) {
        const int row = j % (R * 16), m = j / (R * 16);
        float v = 0.f;
#pragma unroll
        for (int k = 0; k < S; ++k) v += mine[(k * R * 16 + row) * COLUMNS + m];
        put(m, super * R * 16 + row, v);
      }
      parity ^= 1;
    }
  }
}
"""
