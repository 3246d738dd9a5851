# SPDX-License-Identifier: Apache-2.0
"""The CUDA text of the stationary kernel (see `stationary`, which fills in what stands between @ signs)."""

from __future__ import annotations

TAKE = """#pragma unroll
      for (int i = 0; i < 4; ++i) {
        unsigned* to = b[y][t][i / 2] + i % 2 * 4;
        const uint4 v = raw[y][t][i];
        to[0] = v.x; to[1] = v.y; to[2] = v.z; to[3] = v.w;
      }
"""

TAKE_NATURAL = """      // Through the slot that is filled last, as matrices of eight tokens and eight k.
      unsigned char* room = ring + (D - 1) * SLOT;
#pragma unroll
      for (int round = 0; round < ROUNDS; ++round) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = lane % 16 - round * (16 / ROUNDS);
          if (ROUNDS == 1 || (column >= 0 && column < 16 / ROUNDS))
            *reinterpret_cast<uint4*>(room + column * 128 + (2 * i + lane / 16 + column) % 8 * 16) = raw[y][t][i];
        }
        __syncwarp();
#pragma unroll
        for (int i = round * 4 / ROUNDS; i < (round + 1) * 4 / ROUNDS; ++i) {
          const int column = 4 * i + lane / 8 - round * (16 / ROUNDS);
          gq_matrices(b[y][t][i / 2] + i % 2 * 4, room + column * 128 + (lane + column) % 8 * 16);
        }
      }
"""

BODY = """
constexpr int THREADS = W * 32, RUNS = 128 / RUN, NT = (M + 7) / 8, COLUMNS = NT * 8 + 2;
constexpr bool HAS_ZEROS = @HAS_ZEROS@, GATED = @GATED@;
constexpr int OUTS = GATED ? N / 2 : N, SUPERS = GATED ? TILES / 2 : TILES;
constexpr int TURN = U * BITS * 256, GRIDS = U * RUNS, SCALE_AT = TURN, ZERO_AT = SCALE_AT + GRIDS * 32;
constexpr int PART = 16 * COLUMNS, PARTIAL_AT = W * D * SLOT;
// Turns in which eight tokens of a unit of activations pass through a slot.
constexpr int ROUNDS = TURN < 1024 ? 4 : TURN < 2048 ? 2 : 1;
constexpr bool LINES = @LINES@;
constexpr int ITEMS = 16 * NT * 8, KEPT = (ITEMS + THREADS - 1) / THREADS;
constexpr int HALVES = GATED ? 2 : 1;

__device__ __forceinline__ float activated(float v) { return @ACT@; }

__device__ __forceinline__ void run(const half* __restrict__ x, const unsigned* __restrict__ q,
                                    const half* __restrict__ scales, @ZEROS@@BIAS@@RESIDUAL@@OUT@* __restrict__ out,
                                    unsigned char* shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  unsigned char* ring = shared + warp * D * SLOT;
  float* partial = reinterpret_cast<float*>(shared + PARTIAL_AT);
  const unsigned char* zero_points = (const unsigned char*)@ZEROS_POINTER@;
  @MAKE_BARRIER@
  @LET_NEXT_START@

  // The units of K that are this warp's for all tiles, and the tiles in the order in which this block takes them.
  const int first = warp * U, mine = max(min(UNITS - first, U), 0), block = blockIdx.x;
  const int turns = HALVES * ((SUPERS - block + BLOCKS - 1) / BLOCKS);
  auto super_of = [&](int turn) { return block + turn / HALVES * BLOCKS; };
  constexpr bool WHOLE = UNITS == W * U && CHUNKS % 2 == 0 && TURN % 512 == 0;
  const int left = min(mine * 2, CHUNKS - 2 * first) * (BITS * 128);
  const char* from = reinterpret_cast<const char*>(q) + (long long)first * (BITS * 256) + lane * 16;
  // Of scales (lanes 0-15) or zero points.
  constexpr int GRID_TURNS = (2 * GRIDS + 15) / 16;
  const bool is_zero = HAS_ZEROS && lane >= 16;
  int next = 0, slot = 0;
  // From byte `low` of the next tile up to `high`, at its end with its scales and zero points.
  auto request = [&](int low, int high) {
    if (next < turns && (WHOLE || mine > 0)) {
      unsigned char* to = ring + slot * SLOT;
      const long long tile = super_of(next) + (GATED ? next % 2 * SUPERS : 0);
      const char* weights = from + tile * (CHUNKS * BITS * 128);
#pragma unroll
      for (int at = 0; at < TURN; at += 512)
        if (at >= low && at < high && (WHOLE || at + lane * 16 < left)) gq_copy16(to + at + lane * 16, weights + at);
#pragma unroll
      for (int i = 0; i < GRID_TURNS; ++i) {
        if (high < TURN) continue;
        const int number = is_zero ? i * 16 + lane - 16 : i * 8 + lane % 16 / 2;
        const int code = first * 128 + number * RUN;
        const int group = GROUPS == 1 ? 0 : code / GROUP < GROUPS ? code / GROUP : GROUPS - 1;
        const char* grid = is_zero ? reinterpret_cast<const char*>(zero_points) + (tile * GROUPS + group) * 16
                                   : (const char*)scales + (tile * GROUPS + group) * 32 + lane % 2 * 16;
        if (number < GRIDS && (HAS_ZEROS || lane < 16))
          gq_copy16(to + (is_zero ? ZERO_AT + number * 16 : SCALE_AT + i * 256 + lane * 16), grid);
      }
    }
  };
  auto advance = [&]() {
    ++next;
    gq_commit();
    slot = slot + 1 == D ? 0 : slot + 1;
  };
  auto fetch = [&]() {
    request(0, TURN);
    advance();
  };
#pragma unroll
  for (int i = 0; i < EARLY; ++i) fetch();
  // Of the next tile a half, where all of it would hold up the activations behind it.
  if (HALF) request(0, TURN / 2);

  // Activations as fragments, and their sums over groups for the two columns whose results this lane has.
  @WAIT_FOR_PREVIOUS@
  unsigned b[U][NT][2][8];
  float minus[U][NT][RUNS][2];
  uint4 raw[U][NT][4];
#pragma unroll
  for (int y = 0; y < U; ++y)
#pragma unroll
    for (int t = 0; t < NT; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Whole lines of two tokens, or what is this lane's of eight of them.
        const int token = t * 8 + (LINES ? 2 * i + lane / 16 : g);
        const int k = (first + y) * 128 + (LINES ? lane % 16 * 8 : i * 32 + 8 * c);
        raw[y][t][i] = make_uint4(0u, 0u, 0u, 0u);
        if (token < M && y < mine && k < K) raw[y][t][i] = gq_read16(x + (long long)token * K + k);
      }
  // Tile by tile, or the first warp's whole ring would come before the last warp's first slot.
#pragma unroll
  for (int i = EARLY; i < D - 1; ++i) {
    __syncthreads();
    request(HALF && i == EARLY ? TURN / 2 : 0, TURN);
    advance();
  }
#pragma unroll
  for (int y = 0; y < U; ++y)
#pragma unroll
    for (int t = 0; t < NT; ++t) {
@TAKE@      // Sums are products with ones.
      const unsigned ones[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
      float sums[RUNS][4] = {};
#pragma unroll
      for (int step = 0; step < 8; ++step)
        gq_mma4(sums[step * RUNS / 8], ones, b[y][t][step / 4][step % 4 * 2], b[y][t][step / 4][step % 4 * 2 + 1]);
#pragma unroll
      for (int run = 0; run < RUNS; ++run)
#pragma unroll
        for (int i = 0; i < 2; ++i) minus[y][t][run][i] = sums[run][i] * (HAS_ZEROS ? 1.f : float(ZERO));
    }
  @BARRIER_MADE@

  int use = 0, parity = 0;
  float gates[GATED ? KEPT : 1], added[KEPT], added_next[KEPT];
  // Adds up what the warps have of a tile, an element a thread. The up row's thread kept its gate the turn before.
  auto add_up = [&](int turn, bool there) {
#pragma unroll
    for (int n = 0; n < KEPT; ++n) {
      const int j = threadIdx.x + n * THREADS, m_out = j / 16, row = super_of(turn) * 16 + j % 16;
      if (ITEMS % THREADS && j >= ITEMS) continue;
      const float* p = partial + parity * W * PART + j % 16 * COLUMNS + m_out;
      float r = 0.f;
#pragma unroll
      for (int w = 0; w < W; ++w) r += p[w * PART];
      const bool wanted = there && (M % 8 == 0 || m_out < M) && (OUTS % 16 == 0 || row < OUTS);
      if (GATED) {
        float gate = gates[GATED ? n : 0];
        if (turn % 2 == 0) gates[GATED ? n : 0] = r;
        if (wanted && turn % 2) {
          @ADD_BIAS_PAIR@
          r = r * activated(gate) + added[n];
          out[(long long)m_out * OUTS + row] = (@OUT@)r;
        }
      } else if (wanted) {
        @ADD_BIAS@
        r += added[n];
        out[(long long)m_out * OUTS + row] = (@OUT@)r;
      }
    }
  };
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
#pragma unroll
    for (int n = 0; n < KEPT; ++n) {
      added[n] = added_next[n];
      added_next[n] = 0.f;
      const int j = threadIdx.x + n * THREADS, m_out = j / 16, row = super_of(turn) * 16 + j % 16;
      const bool wanted = m_out < M && row < OUTS;
      if (wanted) { @ADD_RESIDUAL_NEXT@ }
    }
    float total[NT][4] = {};
    gq_wait<D - 2>();
    __syncwarp();
    const unsigned char* data = ring + use * SLOT;
    use = use + 1 == D ? 0 : use + 1;
    // Into the slot of the turn before, which every lane has read before the barrier above.
    fetch();
#pragma unroll
    for (int y = 0; y < U; ++y) {
      if (!WHOLE && y >= mine) continue;
      float sum[RUNS][SETS][NT][4] = {};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        unsigned words[BITS], a[4][4];
        gq_words<BITS, true>(words, reinterpret_cast<const unsigned*>(data + (2 * y + h) * BITS * 128), lane);
        @FRAGMENTS@(a, words);
#pragma unroll
        for (int step = 0; step < 4; ++step)
#pragma unroll
          for (int t = 0; t < NT; ++t)
            gq_mma4(sum[(2 * h + step / 2) * RUNS / 4][SETS == 2 ? step % 2 : 0][t], a[step],
                    b[y][t][h][2 * step], b[y][t][h][2 * step + 1]);
      }
#pragma unroll
      for (int run = 0; run < RUNS; ++run) {
        const int at = y * RUNS + run;
        const float2 factor = gq_floats(*reinterpret_cast<const unsigned*>(data + SCALE_AT + at * 32 + g * 4));
        // Everything but the scale is in units of 2^-LOW and 2^-HIGH.
        const unsigned pair = HAS_ZEROS ? *(const unsigned short*)(data + ZERO_AT + at * 16 + g * 2) : 257u;
        const float zero_low = (HAS_ZEROS ? float(pair & 255u) : 1.f) * (1.f / (1 << LOW));
        const float zero_high = (HAS_ZEROS ? float(pair >> 8) : 1.f) * (1.f / (1 << HIGH));
#pragma unroll
        for (int t = 0; t < NT; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float v = sum[run][0][t][i];
            if (SETS == 2) v += sum[run][SETS - 1][t][i] * (1.f / (1 << SECOND));
            v -= (i < 2 ? zero_low : zero_high) * minus[y][t][run][i % 2];
            total[t][i] += v * (i < 2 ? factor.x : factor.y);
          }
      }
    }
    // The tile before is added up here, so that its loads pass while this one is multiplied.
    if (turn > 0) { @PASS_BARRIER@ }
    add_up(turn - 1, turn > 0);
    parity ^= 1;
    float* own = partial + (parity * W + warp) * PART + g * COLUMNS + 2 * c;
#pragma unroll
    for (int t = 0; t < NT; ++t)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const float power = float(1 << (i < 2 ? LOW : HIGH));
        const float2 v = make_float2(total[t][i] * power, total[t][i + 1] * power);
        *reinterpret_cast<float2*>(own + i * 4 * COLUMNS + t * 8) = v;
      }
    @REACH_BARRIER@
  }
  const int turn = turns;
  @PASS_BARRIER@
#pragma unroll
  for (int n = 0; n < KEPT; ++n) added[n] = added_next[n];
  add_up(turn - 1, true);
}
"""

MAKE_BARRIER = """unsigned long long* bar = reinterpret_cast<unsigned long long*>(shared + BARRIER_AT);
  if (threadIdx.x == 0) gq_bar_init(bar, THREADS);"""
REACH_BARRIER = "gq_bar_arrive(bar);"
PASS_BARRIER = "gq_bar_wait(bar, (turn - 1) & 1);"
