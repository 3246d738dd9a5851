# SPDX-License-Identifier: Apache-2.0
"""The kernel of quantized linears for any number of activation rows, on the tensor cores of sm_80 and newer.

A block owns 16 x W x R weight rows and `tokens` rows of activations, and goes along K turn by turn. In a turn each of
its S splits multiplies a unit of 128 k: W warps, which hold R tiles of 16 weight rows each. Weights come through rings
that are private to a warp and activations through stages that the block shares, both by cp.async, `depth` turns deep,
so one barrier a turn is enough. Codes become exact halves code - zero in registers (`tile_source.integers`); sums of a
run of codes with one scale are float32, and so is the multiplication by the scale.

Where there are too few blocks for the GPU, the splits of a block share K, and from sm_90 on the blocks of a cluster,
too; they add up through (distributed) shared memory at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

from gptq_compile.kernels import fragments
from gptq_compile.kernels.cuda import tile_source
from gptq_compile.kernels.cuda.stream import UNIT, Shape

TOKEN_GROUP = 8
"""Token tiles that are multiplied side by side before the next rows: their activations stay in L2."""


@dataclass(frozen=True)
class Config:
    """How the kernel divides its work.

    Attributes:
        warps: W, warps side by side along the weight rows.
        height: R, tiles of 16 weight rows of each.
        tokens: rows of activations of a block, a multiple of 8.
        splits: S, parts of K in a block.
        blocks: C, blocks of a cluster that share K.
        depth: D, turns held in shared memory.
    """

    warps: int
    height: int
    tokens: int
    splits: int
    blocks: int
    depth: int

    @property
    def rows(self) -> int:
        return 16 * self.warps * self.height

    @property
    def threads(self) -> int:
        return 32 * self.warps * self.splits


def slot_bytes(shape: Shape, config: Config) -> int:
    """Returns the bytes of one ring slot of a warp: weights, scales and zero points of a unit."""
    runs = UNIT // shape.run
    return config.height * (shape.grouping.bits * 256 + runs * (48 if shape.has_zeros else 32))


def line(natural: bool) -> int:
    """Returns the halves from one token to the next in a stage: such that reads meet all banks."""
    return UNIT + (8 if natural else 32)


def shared_bytes(shape: Shape, config: Config, natural: bool) -> int:
    """Returns the shared memory of a block; the results take the place of stages and rings."""
    stage = config.splits * config.tokens * line(natural) * 2
    ring = config.warps * config.splits * slot_bytes(shape, config)
    return max(config.depth * (stage + ring), config.splits * config.tokens * (config.rows + 4) * 4)


def row_blocks(shape: Shape, config: Config) -> int:
    """Returns how many blocks the weight rows take."""
    return -(-shape.row_tiles * fragments.TILE_ROWS // config.rows)


def source(name: str, shape: Shape, config: Config, has_bias: bool, out_type: str, natural: bool) -> str:
    """Returns CUDA text with ``name::run(x, q, scales, [zeros], [bias], out, rows, shared)``."""
    bits, grouping = shape.grouping.bits, shape.grouping
    constants = {
        "BITS": bits, "K": grouping.in_features, "N": shape.out_features, "GROUP": grouping.group_size,
        "GROUPS": grouping.groups, "RUN": shape.run, "TILES": shape.row_tiles,
        "CHUNKS": fragments.chunks(grouping.in_features), "UNITS": shape.units, "W": config.warps,
        "R": config.height, "TOKENS": config.tokens, "S": config.splits, "C": config.blocks, "D": config.depth,
        "SLOT": slot_bytes(shape, config), "ZERO": 1 << (bits - 1), "ROW_BLOCKS": row_blocks(shape, config),
        "TOKEN_GROUP": TOKEN_GROUP, "LINE": line(natural),
    }  # fmt: skip
    text = "\n".join(f"constexpr int {key} = {value};" for key, value in constants.items())
    body = (
        _BODY.replace("@READ@", _READ_NATURAL if natural else _READ)
        .replace("@ZEROS@", "const unsigned char* __restrict__ zeros, " if shape.has_zeros else "")
        .replace("@BIAS@", "const half* __restrict__ bias, " if has_bias else "")
        .replace("@OUT@", out_type)
        .replace("@ADD_BIAS@", "+ __half2float(bias[row + i])" if has_bias else "")
        .replace("@INTEGERS@", f"gq_integers{bits}")
        .replace("@HAS_ZEROS@", "true" if shape.has_zeros else "false")
        .replace("@ZEROS_POINTER@", "zeros" if shape.has_zeros else "nullptr")
        .replace("@REMOTE@", "gq_remote4(p, from)" if config.blocks > 1 else "*reinterpret_cast<const float4*>(p)")
        .replace("@BLOCKS_BARRIER@", "gq_cluster_barrier();" if config.blocks > 1 else "")
    )
    head = tile_source.PTX + (tile_source.CLUSTER if config.blocks > 1 else "")
    head += tile_source.COMMON + tile_source.integers(bits)
    return f"{head}\nnamespace {name} {{\n{text}\n{body}\n}}\n"


# B fragments of two steps (32 k from k on) and one tile of eight tokens.
_READ = """
__device__ __forceinline__ void fragments_of(unsigned* b, const half* stage, int tile, int k, int lane) {
  const uint4 v = *reinterpret_cast<const uint4*>(stage + (tile * 8 + lane / 4) * LINE + k + 8 * (lane % 4));
  b[0] = v.x; b[1] = v.y; b[2] = v.z; b[3] = v.w;
}
"""
_READ_NATURAL = """
__device__ __forceinline__ void fragments_of(unsigned* b, const half* stage, int tile, int k, int lane) {
  gq_matrices(b, stage + (tile * 8 + lane % 8) * LINE + k + lane / 8 * 8);
}
"""

_BODY = """
constexpr bool HAS_ZEROS = @HAS_ZEROS@;
constexpr int RUNS = 128 / RUN, ROWS = 16 * W * R, NT = TOKENS / 8, THREADS = 32 * W * S;
constexpr int SCALE_AT = R * BITS * 256, ZERO_AT = SCALE_AT + R * RUNS * 32;
constexpr int STAGE = S * TOKENS * LINE * 2, TURN = STAGE + W * S * SLOT;
constexpr int PER_BLOCK = (UNITS + C - 1) / C, RESULT_LINE = ROWS + 4, SHARE = (ROWS / 8 + C - 1) / C * 8;
@READ@
__device__ __forceinline__ void run(const half* __restrict__ x, const unsigned* __restrict__ q,
                                    const half* __restrict__ scales, @ZEROS@@BIAS@@OUT@* __restrict__ out, int rows,
                                    unsigned char* shared) {
  const int rank = C == 1 ? 0 : blockIdx.x % C, id = blockIdx.x / C;
  const int token_tiles = (rows + TOKENS - 1) / TOKENS, band = id / (TOKEN_GROUP * ROW_BLOCKS);
  const int width = min(token_tiles - band * TOKEN_GROUP, TOKEN_GROUP), place = id - band * TOKEN_GROUP * ROW_BLOCKS;
  const int first_token = (band * TOKEN_GROUP + place % width) * TOKENS, row_block = place / width;
  const int first = rank * PER_BLOCK, last = min(first + PER_BLOCK, UNITS);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int split = warp / W, first_tile = (row_block * W + warp % W) * R;
  const unsigned char* zero_points = (const unsigned char*)@ZEROS_POINTER@;

  // What this lane copies: sixteen bytes of weights of each tile, and of a tile's scales or zero points.
  const char* from[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const long long tile = first_tile + r < TILES ? first_tile + r : TILES - 1;
    from[r] = reinterpret_cast<const char*>(q) + (tile * CHUNKS + 2 * (first + split)) * (BITS * 128) + lane * 16;
  }
  const bool is_zero = HAS_ZEROS && lane >= 16;
  const int mine = is_zero ? lane - 16 : lane % 16 / 2, my_run = mine % RUNS;
  const int my_tile = min(first_tile + mine / RUNS, TILES - 1), group_bytes = is_zero ? 16 : 32;
  const bool has_grid = mine < RUNS * R && (HAS_ZEROS || lane < 16);
  const char* grid = is_zero ? reinterpret_cast<const char*>(zero_points) : reinterpret_cast<const char*>(scales);
  grid += (long long)my_tile * GROUPS * group_bytes + (is_zero ? 0 : lane % 2 * 16);
  const int to_grid = is_zero ? ZERO_AT + mine * 16 : SCALE_AT + lane * 16;
  // Activations: piece j of sixteen bytes is of split j / (16 TOKENS), token j / 16 % TOKENS.
  int ahead = first, slot = 0;
  auto fetch = [&]() {
    unsigned char* to = shared + slot * TURN;
#pragma unroll 4
    for (int j = threadIdx.x; j < S * TOKENS * 16; j += THREADS) {
      const int token = first_token + j / 16 % TOKENS, unit = ahead + j / (16 * TOKENS), k = unit * 128 + j % 16 * 8;
      const bool wanted = token < rows && k < K && unit < last;
      gq_copy16_or_zero(to + (j / 16 * LINE + j % 16 * 8) * 2, wanted ? x + (long long)token * K + k : x, wanted);
    }
    to += STAGE + warp * SLOT;
    const int unit = ahead + split;
    if (unit < last) {
      const bool half_unit = CHUNKS % 2 && unit == UNITS - 1;
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int at = 0; at < BITS * 256; at += 512)
          if ((CHUNKS % 2 == 0 && BITS != 3) || at + lane * 16 < (half_unit ? BITS * 128 : BITS * 256))
            gq_copy16(to + r * BITS * 256 + at + lane * 16, from[r] + at);
        from[r] += S * BITS * 256;
      }
      const int code = unit * 128 + my_run * RUN, group = code / GROUP < GROUPS ? code / GROUP : GROUPS - 1;
      if (has_grid) gq_copy16(to + to_grid, grid + (GROUPS == 1 ? 0 : group * group_bytes));
    }
    ahead += S;
    gq_commit();
    slot = slot + 1 == D ? 0 : slot + 1;
  };
#pragma unroll
  for (int i = 0; i < D - 1; ++i) fetch();

  float total[R][NT][4] = {};
  int use = 0;
#pragma unroll 1
  for (int turn = first; turn < last; turn += S) {
    gq_wait<D - 2>();
    __syncthreads();
    const unsigned char* base = shared + use * TURN;
    const half* stage = reinterpret_cast<const half*>(base) + split * TOKENS * LINE;
    const unsigned char* data = base + STAGE + warp * SLOT;
    use = use + 1 == D ? 0 : use + 1;
    // Into the slot of the turn before, which every warp has read before the barrier above.
    fetch();
    if (turn + split >= last) continue;
    float sum[R][NT][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      unsigned a[R][4][4];
#pragma unroll
      for (int step = 0; step < 4; step += 2) {
        const int k = h * 64 + step * 16;
        if (step == 0 || RUN == 32) {
#pragma unroll
          for (int r = 0; r < R; ++r) {
            unsigned words[BITS], zero = ZERO | ZERO << 8;
            gq_words<BITS, true>(words, reinterpret_cast<const unsigned*>(data + (2 * r + h) * BITS * 128), lane);
            if (HAS_ZEROS)
              zero = *reinterpret_cast<const unsigned short*>(data + ZERO_AT + (r * RUNS + k / RUN) * 16 + g * 2);
            @INTEGERS@(a[r], words, zero & 255u, zero >> 8);
          }
        }
        if (k % RUN == 0) {
#pragma unroll
          for (int i = 0; i < R * NT * 4; ++i) sum[i / (4 * NT)][i / 4 % NT][i % 4] = 0.f;
        }
        // Products that follow each other have sums of their own: one waits 33 clocks for the one before.
        constexpr int SIDE = NT % 4 == 0 ? 4 : NT % 2 == 0 ? 2 : 1;
#pragma unroll
        for (int first_of = 0; first_of < NT; first_of += SIDE) {
          unsigned b[SIDE][4];
#pragma unroll
          for (int t = 0; t < SIDE; ++t) fragments_of(b[t], stage, first_of + t, k, lane);
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int t = 0; t < SIDE; ++t)
#pragma unroll
              for (int r = 0; r < R; ++r)
                gq_mma4(sum[r][first_of + t], a[r][step + i], b[t][2 * i], b[t][2 * i + 1]);
        }
        if ((k + 32) % RUN == 0) {
#pragma unroll
          for (int r = 0; r < R; ++r) {
            const float2 factor = gq_floats(
                *reinterpret_cast<const unsigned*>(data + SCALE_AT + (r * RUNS + k / RUN) * 32 + g * 4));
#pragma unroll
            for (int t = 0; t < NT; ++t)
#pragma unroll
              for (int i = 0; i < 4; ++i) total[r][t][i] += sum[r][t][i] * (i < 2 ? factor.x : factor.y);
          }
        }
      }
    }
  }

  // Results of every split, [token][row], in the place of stages and rings.
  float* results = reinterpret_cast<float*>(shared);
  gq_wait<0>();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < R * NT * 4; ++i) {
    const int token = i / 4 % NT * 8 + 2 * c + i % 2, row = (warp % W * R + i / (4 * NT)) * 16 + g + i % 4 / 2 * 8;
    results[(split * TOKENS + token) * RESULT_LINE + row] = total[i / (4 * NT)][i / 4 % NT][i % 4];
  }
  __syncthreads();
  @BLOCKS_BARRIER@
#pragma unroll 1
  for (int j = threadIdx.x; j < TOKENS * (SHARE / 8); j += THREADS) {
    const int token = j / (SHARE / 8), at = rank * SHARE + j % (SHARE / 8) * 8, row = row_block * ROWS + at;
    if (first_token + token >= rows || row >= N || at >= ROWS) continue;
    float v[8] = {};
#pragma unroll
    for (int from = 0; from < C; ++from)
#pragma unroll
      for (int part = 0; part < S; ++part)
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
          const float* p = results + (part * TOKENS + token) * RESULT_LINE + at + i;
          const float4 four = @REMOTE@;
          v[i] += four.x; v[i + 1] += four.y; v[i + 2] += four.z; v[i + 3] += four.w;
        }
    @OUT@* to = out + (long long)(first_token + token) * N + row;
    if constexpr (N % 8 == 0) {
      alignas(16) @OUT@ eight[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) eight[i] = (@OUT@)(v[i] @ADD_BIAS@);
#pragma unroll
      for (int i = 0; i < (int)sizeof(eight) / 16; ++i)
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(eight)[i];
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (row + i < N) to[i] = (@OUT@)(v[i] @ADD_BIAS@);
    }
  }
  @BLOCKS_BARRIER@
}
"""
