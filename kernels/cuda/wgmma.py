# SPDX-License-Identifier: Apache-2.0
"""The kernel over `NATURAL_TILES` for many rows of activations on Hopper's tensor cores (sm_90a).

out^T = W x^T: the weights are the A operand of wgmma, and A may come from registers, so codes become exact halves
code - zero on their way from shared memory and never exist as a matrix. A block owns `rows` x `tokens` outputs. Each
of its multiplying warps copies the 16-byte pieces that it will need itself into its own ring (cp.async, `depth` units
of 128 k). Four more warps copy activations to stages that all warps multiply.

Sums are float32 in units of the scale of the current group: where a group ends they are multiplied by old / new scale,
so that one set of accumulators is enough and nothing but float32 sums is ever rounded. A scale of zero counts as 1e-20.
Batches of wgmma are two deep: while one runs, the codes of the next are unpacked. None is under way where sums are
touched: ptxas would make all of them wait.

Where a launch would have fewer blocks than the GPU has multiprocessors, the blocks of a cluster share K, and add up
through distributed shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from gptq_compile.kernels import fragments
from gptq_compile.kernels.cuda import stream_input, tile_source, wgmma_source
from gptq_compile.kernels.cuda.stream import UNIT, Shape

SHARED_BYTES = 227 << 10
STREAM_ROWS = 8
"""Up to so many rows of activations `stream` is faster."""
TOKEN_GROUP = 8
"""Token tiles that are multiplied side by side before the next rows: their activations stay in L2."""


@dataclass(frozen=True)
class Config:
    """How the kernel divides its work.

    Attributes:
        groups: W, warpgroups that multiply.
        height: R, tiles of 64 weight rows of each.
        tokens: columns of a block, a width of wgmma.
        stages: P, activations of 128 k held in shared memory.
        depth: D, slots of a warp's ring of weights.
        splits: S, blocks of a cluster that share K.
        registers: (of a multiplying thread, of a copying one), or None to leave them even.
    """

    groups: int
    height: int
    tokens: int
    stages: int
    depth: int
    splits: int = 1
    registers: tuple[int, int] | None = None

    @property
    def rows(self) -> int:
        return 64 * self.groups * self.height

    @property
    def threads(self) -> int:
        return 128 * (self.groups + 1)


Plan = list[tuple[int | None, Config]]
"""What to run for at most how many rows of activations, ascending; None: any number."""


def slot_bytes(shape: Shape, config: Config) -> int:
    """Returns the bytes of one ring slot of a warp: weights, scales and zero points of a unit."""
    runs = UNIT // shape.run
    return config.height * (shape.grouping.bits * 256 + runs * (48 if shape.has_zeros else 32))


def shared_bytes(shape: Shape, config: Config) -> int:
    """Returns the shared memory of a block; the results take the place of stages and rings."""
    copies = config.stages * config.tokens * 2 * UNIT + 4 * config.groups * config.depth * slot_bytes(shape, config)
    results = config.tokens * (config.rows + 4) * 4
    # Barriers, and what aligning to 1,024 bytes may cost.
    return max(copies, results) + 256 + 1024


def blocks_along_rows(shape: Shape, config: Config) -> int:
    """Returns how many blocks the weight rows take."""
    return -(-shape.row_tiles * fragments.TILE_ROWS // config.rows)


def source(name: str, shape: Shape, config: Config, has_bias: bool, out_type: str, has_residual: bool = False) -> str:
    """Returns CUDA text with ``name::run(x, q, scales, [zeros], [bias], [residual], out, rows, shared)``."""
    bits, grouping = shape.grouping.bits, shape.grouping
    consumer, producer = config.registers or (0, 0)
    constants = {
        "BITS": bits, "K": grouping.in_features, "N": shape.out_features, "GROUP": grouping.group_size,
        "GROUPS": grouping.groups, "RUN": shape.run, "TILES": shape.row_tiles,
        "CHUNKS": fragments.chunks(grouping.in_features), "UNITS": shape.units, "W": config.groups,
        "R": config.height, "TOKENS": config.tokens, "P": config.stages, "D": config.depth, "S": config.splits,
        "SLOT": slot_bytes(shape, config), "ZERO": 1 << (bits - 1), "ROW_BLOCKS": blocks_along_rows(shape, config),
        "TOKEN_GROUP": TOKEN_GROUP, "MORE": consumer, "FEWER": producer,
    }  # fmt: skip
    text = "\n".join(f"constexpr int {key} = {value};" for key, value in constants.items())
    body = (
        _BODY.replace("@ZEROS@", "const unsigned char* __restrict__ zeros, " if shape.has_zeros else "")
        .replace("@BIAS@", "const half* __restrict__ bias, " if has_bias else "")
        .replace("@OUT@", out_type)
        .replace("@RESIDUAL@", "const float* __restrict__ residual, " if has_residual else "")
        .replace("@RESIDUAL_POINTER@", "residual" if has_residual else "nullptr")
        .replace("@BIAS_POINTER@", "bias" if has_bias else "nullptr")
        .replace("@GATED@", str(bool(shape.act)).lower())
        .replace("@ACT@", stream_input.ACTIVATIONS[shape.act] if shape.act else "v")
        .replace("@INTEGERS@", f"gq_integers{bits}")
        .replace("@HAS_ZEROS@", "true" if shape.has_zeros else "false")
        .replace("@ZEROS_POINTER@", "zeros" if shape.has_zeros else "nullptr")
    )
    head = tile_source.PTX + tile_source.CLUSTER + tile_source.BARRIERS + wgmma_source.HOPPER
    head += tile_source.COMMON + tile_source.integers(bits)
    return f"{head}\nnamespace {name} {{\n{text}\n{body}\n}}\n"


_BODY = """
constexpr bool HAS_ZEROS = @HAS_ZEROS@;
constexpr bool GATED = @GATED@;
constexpr int RUNS = 128 / RUN, ROWS = 64 * W * R, LINE = ROWS + 4;
// Rows of results of a block, which a cluster shares. With gates, half of the block's rows are gates.
constexpr int STORED = GATED ? ROWS / 2 : ROWS, SHARE = (STORED / 8 + S - 1) / S * 8, OUTS = GATED ? N / 2 : N;
constexpr int SCALE_AT = R * BITS * 256, ZERO_AT = SCALE_AT + R * RUNS * 32;
constexpr int STAGE = TOKENS * 256, RING_AT = P * STAGE, RING = D * SLOT;
constexpr int COPIES = RING_AT + 4 * W * RING, RESULTS = TOKENS * LINE * 4;
constexpr int BARRIERS_AT = (COPIES > RESULTS ? COPIES : RESULTS) + 15 & ~15;
constexpr int STEPS = RUN == 32 ? 2 : 4, BATCHES = 8 / STEPS * R;
constexpr int PER_SPLIT = (UNITS + S - 1) / S;

__device__ __forceinline__ float activated(float v) { return @ACT@; }

// The tile of the layout that holds rows `row` to `row` + 15 of a block.
__device__ __forceinline__ int tile_of(int row_block, int row) {
  const int tile = row_block * (STORED / 16) + row % STORED / 16, tiles = OUTS / 16;
  if (GATED) return min(tile, tiles - 1) + (row < STORED ? 0 : tiles);
  return min(tile, TILES - 1);
}

// Activations to their stages: the sixteen-byte piece j of token t goes to piece j ^ (t % 8) of its 128 bytes.
__device__ __forceinline__ void copy(const half* __restrict__ x, int first_token, int rows, int first, int last,
                                     unsigned char* shared, unsigned long long* full, unsigned long long* empty) {
  const int thread = threadIdx.x % 128, token = first_token + thread / 16, piece = thread % 16;
  const int mine = piece / 8 * TOKENS * 128 + thread / 16 * 128 + (piece % 8 ^ thread / 16) * 16;
  // A unit is handed over when the copies of AHEAD more are on their way.
  constexpr int AHEAD = P - 2;
  int stage = 0, ready = 0;
  unsigned parity = 1;
  auto hand_over = [&]() {
    gq_publish();
    gq_bar_arrive(full + ready);
    if (++ready == P) ready = 0;
  };
#pragma unroll 1
  for (int u = first; u < last; ++u) {
    gq_bar_wait(empty + stage, parity);
    const int k = u * 128 + piece * 8;
    unsigned char* to = shared + stage * STAGE + mine;
#pragma unroll
    for (int i = 0; i < TOKENS / 8; ++i) {
      const bool wanted = token + i * 8 < rows && k < K;
      gq_copy16_or_zero(to + i * 1024, wanted ? x + (long long)(token + i * 8) * K + k : x, wanted);
    }
    gq_commit();
    if (u - first >= AHEAD) {
      gq_wait<AHEAD>();
      hand_over();
    }
    if (++stage == P) { stage = 0; parity ^= 1; }
  }
  gq_wait<0>();
  for (int u = max(last - AHEAD, first); u < last; ++u) hand_over();
}

// Eight results that stand at p in every block of the cluster, and the bias of weight rows from `row` on.
__device__ __forceinline__ void add_up(float* v, const float* p, int row, const half* bias) {
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = bias != nullptr && row + i < N ? __half2float(bias[row + i]) : 0.f;
#pragma unroll
  for (int from = 0; from < S; ++from)
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const float4 four = S == 1 ? *reinterpret_cast<const float4*>(p + i) : gq_remote4(p + i, from);
      v[i] += four.x; v[i + 1] += four.y; v[i + 2] += four.z; v[i + 3] += four.w;
    }
}

__device__ __forceinline__ void run(const half* __restrict__ x, const unsigned* __restrict__ q,
                                    const half* __restrict__ scales, @ZEROS@@BIAS@@RESIDUAL@
                                    @OUT@* __restrict__ out, int rows,
                                    unsigned char* shared) {
  shared += (1024 - gq_shared(shared) % 1024) % 1024;
  unsigned long long* full = reinterpret_cast<unsigned long long*>(shared + BARRIERS_AT);
  unsigned long long* empty = full + P;
  const int rank = S == 1 ? 0 : blockIdx.x % S, id = blockIdx.x / S;
  const int token_tiles = (rows + TOKENS - 1) / TOKENS, band = id / (TOKEN_GROUP * ROW_BLOCKS);
  const int width = min(token_tiles - band * TOKEN_GROUP, TOKEN_GROUP), place = id - band * TOKEN_GROUP * ROW_BLOCKS;
  const int first_token = (band * TOKEN_GROUP + place % width) * TOKENS, row_block = place / width;
  const int first = rank * PER_SPLIT, last = min(first + PER_SPLIT, UNITS);
  if (threadIdx.x == 0) {
    for (int i = 0; i < P; ++i) { gq_bar_init(full + i, 128); gq_bar_init(empty + i, 4 * W); }
  }
  __syncthreads();
  // Told so, the compiler knows that a warp stays together, and computes in uniform registers.
  if (__shfl_sync(0xffffffffu, (int)threadIdx.x / 128, 0) == W) {
    if constexpr (FEWER > 0) gq_fewer_registers<FEWER>();
    copy(x, first_token, rows, first, last, shared, full, empty);
    if constexpr (S > 1) { gq_cluster_barrier(); gq_cluster_barrier(); }
    return;
  }
  if constexpr (MORE > 0) gq_more_registers<MORE>();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  // Row of the block of this warp's first sixteen rows; the next are 64 rows on.
  const int first_row = warp / 4 * R * 64 + warp % 4 * 16;
  unsigned char* ring = shared + RING_AT + warp * RING;
  const unsigned char* zero_points = (const unsigned char*)@ZEROS_POINTER@;
  int ahead = first, slot = 0;
  const char* from[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const long long tile = tile_of(row_block, first_row + 64 * r);
    from[r] = reinterpret_cast<const char*>(q) + tile * (CHUNKS * BITS * 128) + first * (BITS * 256) + lane * 16;
  }
  // Scales are copied by lanes 0-15, zero points by the others: sixteen bytes of one tile and run each.
  const bool is_zero = HAS_ZEROS && lane >= 16;
  const int mine = is_zero ? 2 * (lane - 16) : lane, my_run = mine / 2 % RUNS;
  const bool has_grid = mine < 2 * RUNS * R;
  const int my_tile = tile_of(row_block, first_row + (has_grid ? mine / (2 * RUNS) * 64 : 0));
  const int group_bytes = is_zero ? 16 : 32;
  const char* grid = is_zero ? reinterpret_cast<const char*>(zero_points) : reinterpret_cast<const char*>(scales);
  grid += (long long)my_tile * GROUPS * group_bytes + (is_zero ? 0 : lane % 2 * 16);
  const int to_grid = is_zero ? ZERO_AT + (lane - 16) * 16 : SCALE_AT + lane * 16;
  auto fetch = [&]() {
    if (ahead < last) {
      unsigned char* to = ring + slot * SLOT;
      const bool half = CHUNKS % 2 && ahead == UNITS - 1;
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int at = 0; at < BITS * 256; at += 512)
          if ((CHUNKS % 2 == 0 && BITS != 3) || at + lane * 16 < (half ? BITS * 128 : BITS * 256))
            gq_copy16(to + r * BITS * 256 + at + lane * 16, from[r] + at);
        from[r] += BITS * 256;
      }
      const int code = ahead * 128 + my_run * RUN, group = code / GROUP < GROUPS ? code / GROUP : GROUPS - 1;
      if (has_grid) gq_copy16(to + to_grid, grid + (GROUPS == 1 ? 0 : group * group_bytes));
    }
    ++ahead;
    gq_commit();
    slot = slot + 1 == D ? 0 : slot + 1;
  };
#pragma unroll
  for (int i = 0; i < D - 1; ++i) fetch();

  float sum[R][TOKENS / 2] = {};
  float unit[R][2];
#pragma unroll
  for (int r = 0; r < R; ++r) unit[r][0] = unit[r][1] = 1.f;
  unsigned a[2][STEPS][4];
  auto rescale = [&](const unsigned char* data, int run) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const unsigned pair = *reinterpret_cast<const unsigned*>(data + SCALE_AT + (r * RUNS + run) * 32 + g * 4);
      const float2 scale = gq_floats(pair);
      const float low = scale.x == 0.f ? 1e-20f : scale.x, high = scale.y == 0.f ? 1e-20f : scale.y;
      if constexpr (GROUPS > 1) {
        const float by_low = __fdividef(unit[r][0], low), by_high = __fdividef(unit[r][1], high);
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) sum[r][i] *= i % 4 < 2 ? by_low : by_high;
      }
      unit[r][0] = low;
      unit[r][1] = high;
    }
  };
  int use = 0, stage = 0, before = 0;
  unsigned parity = 0;
#pragma unroll 1
  for (int u = first; u < last; ++u) {
    gq_wait<D - 2>();
    __syncwarp();
    const unsigned char* data = ring + use * SLOT;
    use = use + 1 == D ? 0 : use + 1;
    // Into the slot of the turn before, which every lane has read before the barrier above.
    fetch();
    gq_bar_wait(full + stage, parity);
    const unsigned staged = gq_descriptor(shared + stage * STAGE);
#pragma unroll
    for (int batch = 0; batch < BATCHES; ++batch) {
      const int r = batch % R, k = batch / R * STEPS * 16, half_unit = k / 64, run = k / RUN;
      unsigned words[BITS], fresh[4][4];
      gq_words<BITS, true>(words, reinterpret_cast<const unsigned*>(data + (2 * r + half_unit) * BITS * 128), lane);
      unsigned zero = ZERO | ZERO << 8;
      if (HAS_ZEROS)
        zero = *reinterpret_cast<const unsigned short*>(data + ZERO_AT + (r * RUNS + run) * 16 + g * 2);
      @INTEGERS@(fresh, words, zero & 255u, zero >> 8);
#pragma unroll
      for (int i = 0; i < STEPS * 4; ++i) a[batch % 2][i / 4][i % 4] = fresh[k / 16 % 4 + i / 4][i % 4];
      if (r == 0 && k % RUN == 0 && (k == 0 || GROUPS > 1)) {
        gq_wgmma_wait<0>();
        if (k == 0 && u > first && lane == 0) gq_bar_arrive(empty + before);
        if (u == first || (GROUPS > 1 && (GROUP == RUN || (u * 128 + k) % GROUP == 0))) rescale(data, run);
      }
      gq_wgmma_fence();
#pragma unroll
      for (int step = 0; step < STEPS; ++step)
        gq_wgmma<TOKENS>(sum[r], a[batch % 2][step],
                         staged + (half_unit * TOKENS * 128 + (k / 16 % 4 + step) * 32) / 16);
      gq_wgmma_commit();
      // The batch before is done: its fragments make room for those of the batch after this one.
      gq_wgmma_wait<1>();
    }
    before = stage;
    if (++stage == P) { stage = 0; parity ^= 1; }
  }
  gq_wgmma_wait<0>();

  // Results, [token][row], in the place of stages and rings, which no warp of this block needs any more.
  float* results = reinterpret_cast<float*>(shared);
  const half* bias_of = (const half*)@BIAS_POINTER@;
  gq_wait<0>();
  gq_barrier(1, 128 * W);
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) {
      const int token = i / 4 * 8 + 2 * c + i % 2, row = first_row + r * 64 + g + i % 4 / 2 * 8;
      results[token * LINE + row] = sum[r][i] * unit[r][i % 4 / 2];
    }
  if constexpr (S > 1) gq_cluster_barrier(); else gq_barrier(1, 128 * W);
#pragma unroll 1
  for (int j = threadIdx.x; j < TOKENS * (SHARE / 8); j += 128 * W) {
    const int token = j / (SHARE / 8), at = rank * SHARE + j % (SHARE / 8) * 8, row = row_block * STORED + at;
    if (first_token + token >= rows || row >= OUTS || at >= STORED) continue;
    const float* p = results + token * LINE + at;
    float v[8], gate[8];
    add_up(v, p + (GATED ? STORED : 0), GATED ? OUTS + row : row, bias_of);
    if constexpr (GATED) {
      add_up(gate, p, row, bias_of);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] *= activated(gate[i]);
    }
    const long long place = (long long)(first_token + token) * OUTS + row;
    const float* added = (const float*)@RESIDUAL_POINTER@;
    if constexpr (OUTS % 8 == 0) {
      if (added != nullptr)
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
          const float4 four = *reinterpret_cast<const float4*>(added + place + i);
          v[i] += four.x; v[i + 1] += four.y; v[i + 2] += four.z; v[i + 3] += four.w;
        }
      alignas(16) @OUT@ eight[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) eight[i] = (@OUT@)v[i];
#pragma unroll
      for (int i = 0; i < (int)sizeof(eight) / 16; ++i)
        reinterpret_cast<uint4*>(out + place)[i] = reinterpret_cast<const uint4*>(eight)[i];
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (row + i < OUTS) out[place + i] = (@OUT@)(v[i] + (added != nullptr ? added[place + i] : 0.f));
    }
  }
  if constexpr (S > 1) gq_cluster_barrier();
}
"""
