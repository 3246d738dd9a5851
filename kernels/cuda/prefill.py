# SPDX-License-Identifier: Apache-2.0
"""The kernel over `FragmentTiles` for any number of activation rows, known at run time.

A block of four warps owns 4 x R tiles of 16 weight rows and 64 tokens. Activations go through two buffers in shared
memory, 128 k at a time (cp.async), while the warps multiply the other buffer; row stride 160 halves, so that the
16-byte reads of a quarter warp meet all banks. Weights come straight to registers in fragment order, as the exact
halves code - zero; sums of a run of codes with one scale are float32, and so is the multiplication by the scale.
"""

from __future__ import annotations

from gptq_compile.kernels import fragments
from gptq_compile.kernels.cuda import tile_source
from gptq_compile.kernels.cuda.stream import UNIT, Shape

TOKENS = 64
WARPS = 4
STRIDE = UNIT + 32
SHARED_BYTES = 2 * TOKENS * STRIDE * 2


def height(shape: Shape) -> int:
    """Returns R: two tiles a warp share the reads of activations where there are rows enough."""
    return 2 if shape.out_features >= 2048 else 1


def source(name: str, shape: Shape, has_bias: bool, out_type: str) -> str:
    """Returns CUDA text with ``name::run(x, q, scales, [zeros], [bias], out, rows, shared)``."""
    bits, grouping = shape.grouping.bits, shape.grouping
    constants = {
        "BITS": bits, "K": grouping.in_features, "N": shape.out_features, "GROUP": grouping.group_size,
        "GROUPS": grouping.groups, "RUN": shape.run, "TILES": shape.row_tiles,
        "CHUNKS": fragments.chunks(grouping.in_features), "UNITS": shape.units, "R": height(shape),
        "ZERO": 1 << (bits - 1), "TOKENS": TOKENS, "THREADS": WARPS * 32, "STRIDE": STRIDE,
    }  # fmt: skip
    text = "\n".join(f"constexpr int {key} = {value};" for key, value in constants.items())
    zeros = "const unsigned char* __restrict__ zeros, " if shape.has_zeros else ""
    body = (
        _BODY.replace("@ZEROS@", zeros)
        .replace("@BIAS@", "const half* __restrict__ bias, " if has_bias else "")
        .replace("@OUT@", out_type)
        .replace("@ADD_BIAS@", "v += __half2float(bias[row]);" if has_bias else "")
        .replace("@INTEGERS@", f"gq_integers{bits}")
        .replace("@ZERO_PAIR@", _ZERO_PAIR if shape.has_zeros else "ZERO | ZERO << 8")
    )
    head = tile_source.PTX + tile_source.COMMON + tile_source.integers(bits)
    return f"{head}\nnamespace {name} {{\n{text}\n{body}\n}}\n"


_ZERO_PAIR = "__ldg(reinterpret_cast<const unsigned short*>(zeros) + at)"

_BODY = """
constexpr int RUNS = 128 / RUN, NT = TOKENS / 8;

__device__ __forceinline__ void run(const half* __restrict__ x, const unsigned* __restrict__ q,
                                    const half* __restrict__ scales, @ZEROS@@BIAS@@OUT@* __restrict__ out, int rows,
                                    unsigned char* shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int first_tile = (blockIdx.x * (THREADS / 32) + warp) * R, first_token = blockIdx.y * TOKENS;
  half* staged = reinterpret_cast<half*>(shared);

  auto fetch = [&](int u) {
    half* to = staged + u % 2 * TOKENS * STRIDE;
    for (int j = threadIdx.x; j < TOKENS * 16; j += THREADS) {
      const int token = j / 16, k = u * 128 + j % 16 * 8;
      half* mine = to + token * STRIDE + j % 16 * 8;
      if (first_token + token < rows && k < K)
        gq_copy16(mine, x + (long long)(first_token + token) * K + k);
      else
        *reinterpret_cast<uint4*>(mine) = make_uint4(0u, 0u, 0u, 0u);
    }
    gq_commit();
  };
  fetch(0);
  float total[R][NT][4] = {};
#pragma unroll 1
  for (int u = 0; u < UNITS; ++u) {
    gq_wait<0>();
    __syncthreads();
    if (u + 1 < UNITS) fetch(u + 1);
    const half* tokens = staged + (u % 2 * TOKENS + g) * STRIDE + 8 * c;
    float sum[R][NT][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (CHUNKS % 2 && 2 * u + h >= CHUNKS) break;
      unsigned words[R][BITS];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const long long tile = first_tile + r < TILES ? first_tile + r : TILES - 1;
        gq_words<BITS, false>(words[r], q + (tile * CHUNKS + 2 * u + h) * (BITS * 32), lane);
      }
      unsigned a[R][4][4], scale[R];
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const bool starts = h * 64 + step * 16 == (h * 64 + step * 16) / RUN * RUN;
        const bool ends = h * 64 + (step + 1) * 16 == (h * 64 + (step + 1) * 16) / RUN * RUN;
        if (starts || step == 0) {
          const int group = GROUPS == 1 ? 0 : (u * 128 + h * 64 + step * 16) / GROUP;
#pragma unroll
          for (int r = 0; r < R; ++r) {
            const long long tile = first_tile + r < TILES ? first_tile + r : TILES - 1;
            const long long at = (tile * GROUPS + (group < GROUPS ? group : GROUPS - 1)) * 8 + g;
            scale[r] = __ldg(reinterpret_cast<const unsigned*>(scales) + at);
            const unsigned zero = @ZERO_PAIR@;
            @INTEGERS@(a[r], words[r], zero & 255u, zero >> 8);
          }
        }
        if (starts) {
#pragma unroll
          for (int i = 0; i < R * NT * 4; ++i) sum[i / (4 * NT)][i / 4 % NT][i % 4] = 0.f;
        }
        if (step % 2 == 0) {
          // Two steps share a read of sixteen bytes.
#pragma unroll
          for (int t = 0; t < NT; ++t) {
            const uint4 v = *reinterpret_cast<const uint4*>(tokens + t * 8 * STRIDE + h * 64 + step / 2 * 32);
#pragma unroll
            for (int r = 0; r < R; ++r) {
              gq_mma4(sum[r][t], a[r][step], v.x, v.y);
              gq_mma4(sum[r][t], a[r][step + 1], v.z, v.w);
            }
          }
        }
        if (ends || (CHUNKS % 2 && step == 3 && 2 * u + h == CHUNKS - 1)) {
#pragma unroll
          for (int r = 0; r < R; ++r) {
            const float2 factor = gq_floats(scale[r]);
#pragma unroll
            for (int t = 0; t < NT; ++t)
#pragma unroll
              for (int i = 0; i < 4; ++i) total[r][t][i] += sum[r][t][i] * (i < 2 ? factor.x : factor.y);
          }
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < R * NT * 4; ++i) {
    const int m = first_token + i / 4 % NT * 8 + 2 * c + i % 2;
    const int row = (first_tile + i / (4 * NT)) * 16 + g + i % 4 / 2 * 8;
    if (m < rows && row < N) {
      float v = total[i / (4 * NT)][i / 4 % NT][i % 4];
      @ADD_BIAS@
      out[(long long)m * N + row] = (@OUT@)v;
    }
  }
}
"""
