# SPDX-License-Identifier: Apache-2.0
"""The CUDA text of the stream kernel (see `stream`, which fills in what stands between @ signs)."""

from __future__ import annotations

BODY = """
constexpr int THREADS = T * S * 32, RUNS = 128 / RUN;
@CONSTANTS@
constexpr bool HAS_ZEROS = @HAS_ZEROS@, DEPENDENT = @DEPENDENT@, GATED = @GATED@, FOLDED = @FOLDED@;
constexpr int GRIDS_HELD = U / PACK * RUNS;  // scales a lane needs of a tile and turn
constexpr int SUPERS = (TILES + R - 1) / R, OUTS = GATED ? N / 2 : N, ROWS = GATED ? 16 : R * 16;
constexpr int PIECES = STAGED * 16, HELD = (M * PIECES + THREADS * SIDE - 1) / (THREADS * SIDE) * SIDE;
constexpr int TURN = U * BITS * 256, GRIDS = R * U * RUNS, SCALE_AT = R * TURN, ZERO_AT = SCALE_AT + GRIDS * 32;
constexpr int X_AT = T * S * D * SLOT, SUMS_AT = X_AT + X_BYTES;
constexpr int SCRATCH_AT = SUMS_AT + (M * STAGED * RUNS * int(sizeof(Sum)) + 15) / 16 * 16;
constexpr int PARTIAL_AT = SCRATCH_AT + SCRATCH;

// The i-th piece of eight activations that a thread stages.
__device__ __forceinline__ int piece(int i) { return (i / SIDE * THREADS + int(threadIdx.x)) * SIDE + i % SIDE; }
@INPUT@
@STAGE@
__device__ __forceinline__ float activated(float v) { return @ACT@; }

// The r-th of the tiles that a warp multiplies side by side: neighbours, or that of gates and that of their factors.
__device__ __forceinline__ long long tile_of(int super, int r) {
  if (GATED) return super + r * SUPERS;
  return TILES % R && super * R + r >= TILES ? TILES - 1 : super * R + r;
}

__device__ __forceinline__ void run(@SOURCE@const unsigned* __restrict__ q, const half* __restrict__ scales,
                                    @ZEROS@@BIAS@@RESIDUAL@@OUT@* __restrict__ out, unsigned char* shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int part = warp / S, split = warp % S, blocks = gridDim.x;
  unsigned char* ring = shared + warp * D * SLOT;
  unsigned char* staged = shared + X_AT;
  Sum* sums = reinterpret_cast<Sum*>(shared + SUMS_AT);
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
    for (int i = 0; i < HELD; ++i) before(before_held[i], origin, piece(i));
    // The activations' loads go first, or they would queue behind the weights; but not before they are there.
    if constexpr (!DEPENDENT) {
#pragma unroll
      for (int i = 0; i < HELD; ++i) take(held[i], origin, piece(i));
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
      from[r] = reinterpret_cast<const char*>(q) + tile_of(next, r) * (CHUNKS * BITS * 128) + unit * (BITS * 256) +
                lane * 16;
    }
#pragma unroll
    for (int i = 0; i < GRID_TURNS; ++i) {
      const int mine = is_zero ? i * 16 + lane - 16 : i * 8 + lane % 16 / 2, r = mine / (U * RUNS);
      const long long tile = tile_of(next, r < R ? r : 0);
      grid[i] = is_zero ? reinterpret_cast<const char*>(zero_points) + tile * (GROUPS * 16)
                        : reinterpret_cast<const char*>(scales) + tile * (GROUPS * 32) + lane % 2 * 16;
    }
  };
  aim();
  // From byte `low` of a warp's next turn up to `high`; at its end with scales and zero points.
  auto fetch = [&](int low = 0, int high = TURN) {
    if (next < SUPERS) {
      unsigned char* to = ring + slot * SLOT;
      constexpr bool WHOLE = CHUNKS % (2 * U) == 0 && TURN % 512 == 0;
      const int left = WHOLE ? TURN : min((CHUNKS - 2 * unit) * (BITS * 128), TURN);
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int at = 0; at < TURN; at += 512)
          if (at >= low && at < high && (WHOLE || at + lane * 16 < left))
            gq_copy16(to + r * TURN + at + lane * 16, from[r] + at);
        if (high == TURN) from[r] += S * TURN;
      }
#pragma unroll
      for (int i = 0; i < GRID_TURNS; ++i) {
        const int mine = is_zero ? i * 16 + lane - 16 : i * 8 + lane % 16 / 2;
        const int first = unit * 128 + mine % (U * RUNS) * RUN;
        const int group = GROUPS == 1 ? 0 : first / GROUP < GROUPS ? first / GROUP : GROUPS - 1;
        if (high == TURN && mine < GRIDS && (HAS_ZEROS || lane < 16))
          gq_copy16(to + (is_zero ? ZERO_AT + mine * 16 : SCALE_AT + i * 256 + lane * 16),
                    grid[i] + group * (is_zero ? 16 : 32));
      }
      if (high < TURN) return;
      unit += S * U;
      if (unit >= UNITS) { unit = split * U; next += blocks * T; aim(); }
    }
    gq_commit();
    slot = slot + 1 == D ? 0 : slot + 1;
  };
#pragma unroll
  for (int i = 0; i < EARLY; ++i) fetch();
  // Of the next turn a half, where all of it would hold up the activations behind it.
  if (HALF && next < SUPERS) fetch(0, TURN / 2);

  @WAIT_FOR_PREVIOUS@
  if constexpr (KEPT) {
    if constexpr (DEPENDENT) {
#pragma unroll
      for (int i = 0; i < HELD; ++i) take(held[i], origin, piece(i));
    }
#pragma unroll
    for (int i = EARLY; i < D - 1; ++i) fetch(HALF && i == EARLY ? TURN / 2 : 0);
    if constexpr (STATISTICS) statistics<HELD>(statistics_of, held, reinterpret_cast<float*>(shared + SCRATCH_AT));
#pragma unroll
    for (int i = 0; i < HELD; i += SIDE) {
      float x[SIDE][8];
#pragma unroll
      for (int p = 0; p < SIDE; ++p) finish(x[p], held[i + p], before_held[i + p], statistics_of, piece(i + p));
      stage(x, piece(i), staged, sums);
    }
  } else {
    // As many loads at once as there is room for: each turn takes as long as one of them.
#pragma unroll 1
    for (int first = 0; first < HELD; first += MOST_HELD) {
      Held some[MOST_HELD];
#pragma unroll
      for (int i = 0; i < MOST_HELD; ++i) take(some[i], origin, piece(first + i));
      if (first == 0) {
#pragma unroll
        for (int i = EARLY; i < D - 1; ++i) fetch(HALF && i == EARLY ? TURN / 2 : 0);
      }
#pragma unroll
      for (int i = 0; i < MOST_HELD; i += SIDE) {
        float x[SIDE][8];
#pragma unroll
        for (int p = 0; p < SIDE; ++p) finish(x[p], some[i + p], before_held[0], statistics_of, piece(first + i + p));
        stage(x, piece(first + i), staged, sums);
      }
    }
  }
@BEFORE@  __syncthreads();
  float scales_of[FOLDED ? M : 1];
#pragma unroll
  for (int m = 0; m < M; ++m)
    if (FOLDED) scales_of[m] = @SCALE_OF@;
  // What a row's sums are multiplied with; written without an index, which would put the numbers in memory.
  auto scaled = [&](int row, float v) {
    float scale = 1.f;
#pragma unroll
    for (int m = 0; m < M; ++m)
      if (FOLDED && row == m) scale = scales_of[m];
    return v * scale;
  };

@OPERANDS@
  int use = 0, parity = 0;
#pragma unroll 1
  for (int super = blockIdx.x + blocks * part; super < SUPERS; super += blocks * T) {
    float total[R][NT][EACH] = {};
#pragma unroll 1
    for (int u = split * U; u < UNITS; u += S * U) {
      gq_wait<D - 2>();
      __syncwarp();
      const unsigned char* data = ring + use * SLOT;
      use = use + 1 == D ? 0 : use + 1;
      unsigned words[U][2][R][BITS], scale[R][GRIDS_HELD], zero[R][HAS_ZEROS ? GRIDS_HELD : 1];
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int h = 0; h < 2 * U; ++h)
          gq_words<BITS, true>(words[h / 2][h % 2][r],
                               reinterpret_cast<const unsigned*>(data + r * TURN + h * BITS * 128), lane);
#pragma unroll
        for (int run = 0; run < GRIDS_HELD; ++run) {
          const int at = (r * U + run / RUNS * PACK + slot_of) * RUNS + run % RUNS;
          scale[r][run] = *reinterpret_cast<const unsigned*>(data + SCALE_AT + at * 32 + g * 4);
          if constexpr (HAS_ZEROS)
            zero[r][run] = *reinterpret_cast<const unsigned short*>(data + ZERO_AT + at * 16 + g * 2);
        }
      }
      // Into the slot of the turn before, which every lane has read before the barrier above.
      fetch();

@ACCUMULATORS@#pragma unroll
      for (int y = 0; y < U; ++y) {
@MULTIPLY@      }
    }
    auto put = [&](int m, int row, float v) {
      if (m < M && row < N) {
        v = scaled(m, v);
        @ADD_BIAS@
        @ADD_RESIDUAL@
        out[(long long)m * N + row] = (@OUT@)v;
      }
    };
    auto put_gated = [&](int m, int row, float gate, float v) {
      if (m < M && row < OUTS) {
        gate = scaled(m, gate);
        v = scaled(m, v);
        @ADD_BIAS_PAIR@
        out[(long long)m * OUTS + row] = (@OUT@)(activated(gate) * v);
      }
    };
    // Which token and row of the tile the i-th total of a lane is of.
    auto token_of = [&](int t, int i) { return @TOKEN@; };
    auto row_of = [&](int r, int i) { return r * 16 + g + i / (EACH / 2) * 8; };
    float gates[GATED ? NT : 1][EACH];
    float* mine = S > 1 ? partial + ((parity * T + part) * S) * R * 16 * COLUMNS : nullptr;
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int t = 0; t < NT; ++t)
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
          float v = total[r][t][i] * (i < EACH / 2 ? UNIT_LOW : UNIT_HIGH);
#pragma unroll
          for (int offset = PAIRS; offset < 4; offset *= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
          if (PACK > 1 && slot_of > 0) continue;
          const int token = token_of(t, i), row = row_of(r, i);
          if (S == 1 && GATED && r == 0) gates[t][i] = v;
          else if (S == 1 && GATED) put_gated(token, super * 16 + row - 16, gates[t][i], v);
          else if (S == 1) put(token, super * R * 16 + row, v);
          else if (token < COLUMNS) mine[(split * R * 16 + row) * COLUMNS + token] = v;
        }
    if constexpr (S > 1) {
      gq_barrier(part + 1, S * 32);
      for (int j = split * 32 + lane; j < ROWS * M; j += S * 32) {
        const int row = j % ROWS, m = j / ROWS;
        float v = 0.f, gate = 0.f;
#pragma unroll
        for (int k = 0; k < S; ++k) {
          if (GATED) gate += mine[(k * R * 16 + row) * COLUMNS + m];
          v += mine[(k * R * 16 + (GATED ? 16 : 0) + row) * COLUMNS + m];
        }
        if (GATED) put_gated(m, super * 16 + row, gate, v);
        else put(m, super * R * 16 + row, v);
      }
      parity ^= 1;
    }
  }
}
"""
