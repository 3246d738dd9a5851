# SPDX-License-Identifier: Apache-2.0
"""The CUDA text of the resident kernel (see `resident`, which fills in what stands between @ signs)."""

from __future__ import annotations

OPERAND_NATURAL = """
  // Matrices of (k / 8, token / 8).
#pragma unroll
    for (int i = 0; i < 2 * NT; ++i) {
      const int token = NT == 2 ? lane / 16 * 8 + lane % 8 : lane % 8;
      const int piece = NT == 2 ? i * 2 + lane / 8 % 2 : i * 4 + lane / 8;
      gq_matrices(b[h] + 4 * i, from + token * 128 + (piece ^ token % 8) * 16);
    }
"""

OPERAND = """
  // Eight k of a token are what a lane feeds to two steps.
#pragma unroll
    for (int pair = 0; pair < 2; ++pair)
#pragma unroll
      for (int t = 0; t < NT; ++t) {
        const uint4 v = *reinterpret_cast<const uint4*>(from + (t * 8 + g) * 128 + ((pair * 4 + c) ^ g) * 16);
        unsigned* to = b[h] + 4 * NT * pair + 2 * t;
        to[0] = v.x; to[1] = v.y; to[2 * NT] = v.z; to[2 * NT + 1] = v.w;
      }
"""

BODY = """
constexpr bool HAS_ZEROS = @HAS_ZEROS@, GATED = @GATED@;
constexpr int WARPS = P * S, THREADS = WARPS * 32, RUNS = 128 / RUN, STEPS = 8 / RUNS, NT = TOKENS / 8;
constexpr int HALVES = GATED ? 2 : 1, OUTS = GATED ? N / 2 : N, SUPERS = TILES / HALVES;
constexpr int PER_BLOCK = (UNITS + C - 1) / C, STAGED = U * S, LINE = TOKENS * 128;
constexpr int PIECES = R * NT, GROUPS_OF_PIECES = (PIECES + S - 1) / S, PER_WARP = PIECES_BYTES / 16;
constexpr int TILE = BITS * 256, SCALE_AT = R * TILE, ZERO_AT = SCALE_AT + R * RUNS * 32, RESULT = 16 * TOKENS;
constexpr bool WHOLE = UNITS == C * S * U && CHUNKS % 2 == 0;

__device__ __forceinline__ float activated(float v) { return @ACT@; }

__device__ __forceinline__ void run(const half* __restrict__ x, const unsigned* __restrict__ q,
                                    const half* __restrict__ scales, @ZEROS@@BIAS@@RESIDUAL@@OUT@* __restrict__ out,
                                    unsigned char* shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int rank = blockIdx.x % C, cluster = blockIdx.x / C, part = warp % S, place = warp / S;
  @LET_NEXT_START@
  // Unit y of this warp is the block's unit y * S + part. Its tiles r of a turn are neighbours among the cluster's.
  const int first = rank * PER_BLOCK, last = min(first + PER_BLOCK, UNITS);
  const int tiles = (SUPERS - cluster + CLUSTERS - 1) / CLUSTERS * HALVES;
  unsigned char* ring = shared + RING_AT + warp * (D * SLOT);
  const unsigned char* zero_points = (const unsigned char*)@ZEROS_POINTER@;
  // The next slot: its tiles from number `next` on, its unit, and where they are.
  constexpr long long PER_TILE = (long long)CHUNKS * BITS * 128;
  int next = place * R, unit = first + part, slot = 0;
  auto tile_of = [&](int number) { return cluster + number / HALVES * CLUSTERS + number % HALVES * SUPERS; };
  const char* weights = reinterpret_cast<const char*>(q) + tile_of(next) * PER_TILE + unit * TILE + lane * 16;
  // Sixteen bytes a lane: scales of a run of codes are two of them, zero points one.
  const char* scales_from = (const char*)scales + tile_of(next + lane / 2 / RUNS) * (GROUPS * 32LL) + lane % 2 * 16;
  const unsigned char* zeros_from = zero_points + (HAS_ZEROS ? tile_of(next + lane / RUNS) * (GROUPS * 16LL) : 0);
  unsigned char* to = ring + lane * 16;
  auto group_of = [&](int run) {
    const int code = unit * 128 + run * RUN;
    return GROUPS == 1 ? 0 : K % 128 ? min(code / GROUP, GROUPS - 1) : code / GROUP;
  };
  auto fetch = [&](int low, int high) {  // of its tiles those from `low` on
    if (WHOLE || unit < last) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const long long on = (r / HALVES * CLUSTERS + r % HALVES * SUPERS) * PER_TILE;
#pragma unroll
        for (int at = 0; at < TILE; at += 512)
          if (r >= low && r < high && next + r < tiles && (TILE % 512 == 0 || at + lane * 16 < TILE) &&
              (CHUNKS % 2 == 0 || at + lane * 16 < (CHUNKS - 2 * unit) * (BITS * 128)))
            gq_copy16(to + r * TILE + at, weights + on + at);
      }
      if (low == 0 && lane < 2 * R * RUNS && next + lane / 2 / RUNS < tiles)
        gq_copy16(to + SCALE_AT, scales_from + group_of(lane / 2 % RUNS) * 32);
      if (HAS_ZEROS && low == 0 && lane < R * RUNS && next + lane / RUNS < tiles)
        gq_copy16(to + ZERO_AT, zeros_from + group_of(lane % RUNS) * 16);
    }
    gq_commit();
    if (high < R) return;
    weights += S * TILE;
    unit += S;
    if (unit >= first + STAGED) {
      constexpr long long TILES_ON = P * R / HALVES * CLUSTERS;
      unit -= STAGED;
      next += P * R;
      weights += TILES_ON * PER_TILE - STAGED * TILE;
      scales_from += TILES_ON * GROUPS * 32;
      if (HAS_ZEROS) zeros_from += TILES_ON * GROUPS * 16;
    }
    to += SLOT;
    if (++slot == D) {
      slot = 0;
      to -= D * SLOT;
    }
  };
  fetch(0, EARLY);
  unsigned long long* arrived = reinterpret_cast<unsigned long long*>(shared + BARRIER_AT);
  if (threadIdx.x == 0) {
    gq_bar_init(arrived, 1);
    gq_publish_barriers();
    gq_bar_expect(arrived, (tiles / HALVES - rank + C - 1) / C * HALVES * C * RESULT * 4);
  }
  __syncwarp();
  gq_cluster_arrive();
  @WAIT_FOR_PREVIOUS@

  // Activations: of each unit two halves of TOKENS lines of 64 k, whose sixteen-byte piece j of token t is at
  // j ^ (t % 8).
  constexpr int AT_A_TIME = THREADS / 16;
  constexpr int PERIOD = AT_A_TIME % TOKENS == 0 ? 1 : AT_A_TIME * 2 % TOKENS == 0 ? 2 : AT_A_TIME * 4 % TOKENS == 0 ? 4
                         : AT_A_TIME * 8 % TOKENS == 0 ? 8 : 16;
  const int thread = gq_thread();  // of which the compiler knows nothing earlier, so that addresses are not made before
  const int piece = thread % 16;
#pragma unroll
  for (int i = 0; i < (STAGED * TOKENS + AT_A_TIME - 1) / AT_A_TIME; ++i) {
    // The token is that of PERIOD turns before, the unit some on from that.
    const int line = i % PERIOD * AT_A_TIME + thread / 16, token = line % TOKENS;
    const int on = i / PERIOD * (PERIOD * AT_A_TIME / TOKENS), unit = line / TOKENS;
    const int k = (first + unit) * 128 + piece * 8;
    const half* from = x + (token * K + k) + on * 128;
    unsigned char* to = shared + unit * (2 * LINE) + piece / 8 * LINE + token * 128 + (piece % 8 ^ token % 8) * 16;
    const bool inside = (M % 8 == 0 || token < M) && (WHOLE || first + unit + on < last) &&
                        (K % 128 == 0 || k + on * 128 < K);
    if (i * AT_A_TIME + AT_A_TIME <= STAGED * TOKENS || unit + on < STAGED)
      gq_copy16_or_zero(to + on * (2 * LINE), inside ? from : x, inside);
  }
  gq_commit();
  if (EARLY < R) fetch(EARLY, R);
  gq_wait<0>();
#pragma unroll 1
  for (int i = 1; i < D; ++i) fetch(0, R);
  __syncthreads();

  // Half a unit of weights and activations: what is multiplied next is on its way to registers while this is.
  unsigned words[2][R][BITS], b[2][8 * NT];
  auto load = [&](const unsigned char* data, int y, int h) {
#pragma unroll
    for (int r = 0; r < R; ++r)
      gq_words<BITS, true>(words[h][r], reinterpret_cast<const unsigned*>(data + (2 * r + h) * BITS * 128), lane);
    const unsigned char* from = shared + (y * S + part) * (2 * LINE) + h * LINE;
@OPERAND@
  };
  load(ring, 0, 0);
  // Sums of the activations of a run, [unit][run][token], are products with ones.
  float* sums = reinterpret_cast<float*>(shared + SUMS_AT);
#pragma unroll
  for (int unit = warp; unit < STAGED; unit += WARPS) {
    constexpr int CHAINS = RUNS == 1 ? 2 : RUNS;
    float d[CHAINS][4] = {};
#pragma unroll
    for (int step = 0; step < 8; ++step) {
      unsigned a[4];
      const int token = NT == 2 ? lane % 16 : lane % 8, at = step % 4 * 2 + lane / 16;
      gq_matrices(a, shared + unit * (2 * LINE) + step / 4 * LINE + token * 128 + (at ^ token % 8) * 16);
      gq_mma4(d[step * CHAINS / 8], a, 0x3c003c00u, 0x3c003c00u);
    }
    if (c == 0)
#pragma unroll
      for (int run = 0; run < RUNS; ++run)
#pragma unroll
        for (int t = 0; t < NT; ++t) {
          const float more = RUNS == 1 ? d[CHAINS - 1][2 * t] : 0.f;
          sums[(unit * RUNS + run) * TOKENS + t * 8 + g] = d[run][2 * t] + more;
        }
  }
  __syncthreads();

  int use = 0;
  float* results = reinterpret_cast<float*>(shared + RESULTS_AT);
#pragma unroll 1
  for (int begin = 0; begin < tiles; begin += P * R) {
    float total[R][NT][4] = {};
#pragma unroll 1
    for (int y = 0; y < U; ++y) {
      const unsigned char* data = ring + use * SLOT;
      use = use + 1 == D ? 0 : use + 1;
      load(data, y, 1);
      unsigned factor[R][RUNS], zero[R][RUNS];
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int run = 0; run < RUNS; ++run) {
          const int at = r * RUNS + run;
          factor[r][run] = *reinterpret_cast<const unsigned*>(data + SCALE_AT + at * 32 + g * 4);
          if (!WHOLE && first + y * S + part >= last) factor[r][run] = 0;  // nothing was copied
          if (HAS_ZEROS) zero[r][run] = *reinterpret_cast<const unsigned short*>(data + ZERO_AT + at * 16 + g * 2);
        }
      float minus[R][NT][4], sum[R][SETS][NT][4];
      auto subtrahend = [&](int run) {
#pragma unroll
        for (int t = 0; t < NT; ++t) {
          const float* at = sums + ((y * S + part) * RUNS + run) * TOKENS + t * 8 + 2 * c;
          const float2 v = *reinterpret_cast<const float2*>(at);
#pragma unroll
          for (int r = 0; r < R; ++r)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const unsigned pair = HAS_ZEROS ? zero[r][run] : 0u;
              const float zero_point = HAS_ZEROS ? float(i < 2 ? pair & 255u : pair >> 8) : float(ZERO);
              minus[r][t][i] = zero_point * (i < 2 ? -1.f / (1 << LOW) : -1.f / (1 << HIGH)) * (i % 2 ? v.y : v.x);
            }
        }
      };
      unsigned a[R][4][4];
#pragma unroll
      for (int step = 0; step < 8; ++step) {
        const int run = step / STEPS;
        if (step == 4) {
          gq_wait<D - 2>();
          __syncwarp();
          fetch(0, R);  // into this unit's slot, which every lane has read
          load(ring + use * SLOT, y + 1 == U ? 0 : y + 1, 0);
        }
#pragma unroll
        for (int r = 0; r < R; ++r)
          if (step % 4 == 0) @FRAGMENTS@(a[r], words[step / 4][r]);
        if (step % STEPS == 0) {
          subtrahend(run);
#pragma unroll
          for (int r = 0; r < R; ++r)
#pragma unroll
            for (int t = 0; t < NT; ++t)
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                sum[r][0][t][i] = minus[r][t][i];
                if (SETS == 2) sum[r][SETS - 1][t][i] = 0.f;
              }
        }
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
          for (int t = 0; t < NT; ++t) {
            const unsigned* operand = b[step / 4] + 2 * (NT * (step % 4) + t);
            gq_mma4(sum[r][SETS == 2 ? step % 2 : 0][t], a[r][step % 4], operand[0], operand[1]);
          }
        if (step % STEPS != STEPS - 1) continue;
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const float2 scale = gq_floats(factor[r][run]);
#pragma unroll
          for (int t = 0; t < NT; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              float v = sum[r][0][t][i];
              if (SETS == 2) v += sum[r][SETS - 1][t][i] * (1.f / (1 << SECOND));
              total[r][t][i] += v * (i < 2 ? scale.x : scale.y);
            }
        }
      }
    }
    if (begin == 0) gq_cluster_wait();  // every block has made its barrier
    // Of what the S warps of a place have, each adds up every S-th piece: one r and t, four floats a lane.
    float4* left = reinterpret_cast<float4*>(shared + PIECES_AT) + lane;
    auto piece_of = [&](int group, int which, float* v) {
#pragma unroll
      for (int other = 0; other < S; ++other) {
        const int piece = min(group * S + other, PIECES - 1);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (other == 0 || other == which) v[i] = total[piece / NT][piece % NT][i];
      }
    };
    if (S > 1) {
      __syncwarp();
#pragma unroll
      for (int group = 0; group < GROUPS_OF_PIECES; ++group)
#pragma unroll
        for (int i = 1; i < S; ++i) {
          const int which = (part + i) % S;
          float v[4];
          piece_of(group, which, v);
          if (PIECES % S == 0 || group * S + which < PIECES)
            left[warp * PER_WARP + (group * S + which) * 32] = make_float4(v[0], v[1], v[2], v[3]);
        }
      gq_barrier(1 + place, 32 * S);
    }
    // To the block that stores a tile: [tile][block][t][lane][4], in units of 2^-LOW and 2^-HIGH.
#pragma unroll
    for (int group = 0; group < GROUPS_OF_PIECES; ++group) {
      const int piece = group * S + part, number = begin + place * R + piece / NT, super = number / HALVES;
      if ((PIECES % S && piece >= PIECES) || number >= tiles) continue;
      float v[4];
      piece_of(group, part, v);
#pragma unroll
      for (int i = 1; i < S; ++i) {
        const float4 more = left[(place * S + (part + i) % S) * PER_WARP + piece * 32];
        v[0] += more.x; v[1] += more.y; v[2] += more.z; v[3] += more.w;
      }
      float* to = results + ((super / C * HALVES + number % HALVES) * C + rank) * RESULT;
      gq_send4(to + piece % NT * 128 + lane * 4, arrived, super % C, v);
    }
    if (S > 1 && TURNS > 1) gq_barrier(1 + place, 32 * S);
  }
  gq_wait<0>();
  gq_bar_wait_cluster(arrived, 0);
  constexpr int EACH = NT * 64;  // pairs of results of a tile
#pragma unroll 1
  for (int j = threadIdx.x; ; j += THREADS) {
    const int at = j / EACH, super = at * C + rank, from = j % 64 / 2;
    if (super * HALVES >= tiles) break;
    const float* p = results + at * HALVES * C * RESULT + j % EACH * 2;
    float pairs[HALVES][2] = {};
#pragma unroll
    for (int half_of = 0; half_of < HALVES; ++half_of)
#pragma unroll
      for (int block = 0; block < C; ++block) {
        const float2 two = *reinterpret_cast<const float2*>(p + (half_of * C + block) * RESULT);
        pairs[half_of][0] += two.x;
        pairs[half_of][1] += two.y;
      }
    const int row = (cluster + super * CLUSTERS) * 16 + from / 4 + j % 2 * 8;
    const float power = j % 2 ? float(1 << HIGH) : float(1 << LOW);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = j % EACH / 64 * 8 + from % 4 * 2 + i;
      if (row >= OUTS || token >= M) continue;
      float gate = pairs[0][i] * power, v = pairs[HALVES - 1][i] * power;
      @ADD_BIAS@
      if (GATED) v *= activated(gate);
      @ADD_RESIDUAL@
      out[(long long)token * OUTS + row] = (@OUT@)v;
    }
  }
}
"""
