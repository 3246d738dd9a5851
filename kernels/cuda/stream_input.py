# SPDX-License-Identifier: Apache-2.0
"""Where the activations of a stream kernel come from: a tensor as it is, a norm of one, or a gated (activated) one.

Each kind is CUDA text that defines `Before` (what does not depend on the previous kernel, loaded first), `Held` (what
does), `take`, `finish` (eight of them, not rounded) and, for norms, `Row` with the statistics of a row. Every block
computes all of it: a launch saved is worth more than some thousand multiplications.

The scale of an RMSNorm is one number of a row, so it can as well multiply what comes out of the linear (`folded`): then
nothing waits for the sum over the row. Only where activations become integers, whose unit follows their size.
"""

from __future__ import annotations

from dataclasses import dataclass

PLAIN, RMS_NORM, LAYER_NORM, GATED, ACTIVATED = "plain", "rms_norm", "layer_norm", "gated", "activated"
NORMS = (RMS_NORM, LAYER_NORM)
C_TYPES = {"float16": "half", "float32": "float"}

MOST_HELD = {PLAIN: 8, RMS_NORM: 4, LAYER_NORM: 4, GATED: 4, ACTIVATED: 8}
"""Pieces of eight activations that a thread keeps in registers while the first weights are on their way."""


@dataclass(frozen=True)
class Input:
    """How activations are made.

    Attributes:
        kind: one of the names above.
        dtype: of the tensor that is read; what is multiplied is always half precision.
        eps, offset, has_weight, has_bias: of a norm over all of K; weight and bias are float32.
        act: of a gated or activated input, a key of `ACTIVATIONS`.
        width, at: row length of the tensor that holds the gate (or the activated values), and where they begin.
        up_width, up_at: the same for the other factor.
    """

    kind: str = PLAIN
    dtype: str = "float16"
    eps: float = 0.0
    offset: float = 0.0
    has_weight: bool = False
    has_bias: bool = False
    act: str = ""
    width: int = 0
    at: int = 0
    up_width: int = 0
    up_at: int = 0

    @property
    def parameters(self) -> list[tuple[str, str]]:
        """(name, C type) of the kernel's first arguments."""
        found = [("x", C_TYPES[self.dtype])]
        if self.kind == GATED:
            found.append(("up", C_TYPES[self.dtype]))
        if self.kind in NORMS:
            found += [("norm_weight", "float")] * self.has_weight + [("norm_bias", "float")] * self.has_bias
        return found


AS_IT_IS = Input()

ACTIVATIONS = {
    "silu": "__fdividef(v, 1.f + __expf(-v))",
    "gelu": "0.5f * v * (1.f + erff(v * 0.70710678f))",
    "gelu_tanh": "0.5f * v * (1.f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)))",
    "gelu_quick": "__fdividef(v, 1.f + __expf(-1.702f * v))",
    "relu": "v > 0.f ? v : 0.f",
    "relu2": "v > 0.f ? v * v : 0.f",
    "sigmoid": "__fdividef(1.f, 1.f + __expf(-v))",
    "tanh": "tanhf(v)",
    "identity": "v",
}
"""C expressions of a float v; the same names as `kernels.activations`. The fast exponential and division are off by
some 2**-21, and every block of a linear computes them for all of K."""


def source(made: Input, folded: bool = False) -> str:
    """Returns the text of one kind, for the namespace of a kernel with M, K, THREADS, PIECES and `piece`.

    With `folded` (see `may_fold`) `finish` leaves out the scales of rows and `row_scale` returns them, after a barrier.
    """
    text = _READ[made.dtype] + {
        PLAIN: _PLAIN, RMS_NORM: _NORM, LAYER_NORM: _NORM, GATED: _GATED, ACTIVATED: _GATED,
    }[made.kind]  # fmt: skip
    values = {
        "@WEIGHT_MEMBER@": "const float* weight; " if made.has_weight else "",
        "@BIAS_MEMBER@": "const float* bias; " if made.has_bias else "",
        "@UP_MEMBER@": "const @X@* up; " if made.kind == GATED else "",
        "@X@": C_TYPES[made.dtype],
        "@EPS@": f"{float(made.eps)!r}f",
        "@OFFSET@": f"{float(made.offset)!r}f",
        "@HAS_WEIGHT@": str(made.has_weight).lower(),
        "@HAS_BIAS@": str(made.has_bias).lower(),
        "@CENTERED@": str(made.kind == LAYER_NORM).lower(),
        "@FOLDED@": str(folded).lower(),
        "@HAS_UP@": str(made.kind == GATED).lower(),
        "@WEIGHT@": "s.weight" if made.has_weight else "(const float*)nullptr",
        "@BIAS@": "s.bias" if made.has_bias else "(const float*)nullptr",
        "@UP@": "s.up" if made.kind == GATED else "s.x",
        "@ACT@": ACTIVATIONS.get(made.act, "v"),
        "@WIDTH@": str(made.width),
        "@AT@": str(made.at),
        "@UP_WIDTH@": str(made.up_width),
        "@UP_AT@": str(made.up_at),
    }
    for key, value in values.items():
        text = text.replace(key, value)
    return text


def may_fold(made: Input) -> bool:
    """Whether the activations of a row are what is read times one number, feature by feature."""
    return made.kind == RMS_NORM and not made.has_bias


_READ = {
    "float16": """
struct Eight { uint4 v; };
__device__ __forceinline__ void zero8(Eight& e) { e.v = make_uint4(0u, 0u, 0u, 0u); }
__device__ __forceinline__ void read8(Eight& e, const half* p) { e.v = gq_read16(p); }
__device__ __forceinline__ void floats8(float* f, const Eight& e) {
  const unsigned words[4] = {e.v.x, e.v.y, e.v.z, e.v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) { float2 p = gq_floats(words[i]); f[2 * i] = p.x; f[2 * i + 1] = p.y; }
}
""",
    "float32": """
struct Eight { uint4 v[2]; };
__device__ __forceinline__ void zero8(Eight& e) { e.v[0] = e.v[1] = make_uint4(0u, 0u, 0u, 0u); }
__device__ __forceinline__ void read8(Eight& e, const float* p) { e.v[0] = gq_read16(p); e.v[1] = gq_read16(p + 4); }
__device__ __forceinline__ void floats8(float* f, const Eight& e) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    f[4 * i] = gq_float(e.v[i].x); f[4 * i + 1] = gq_float(e.v[i].y);
    f[4 * i + 2] = gq_float(e.v[i].z); f[4 * i + 3] = gq_float(e.v[i].w);
  }
}
""",
}

_PLAIN = """
constexpr bool STATISTICS = false;
struct Source { const half* x; };
struct Before {};
struct Held { Eight e; };
struct Row {};
template <int COUNT> __device__ __forceinline__ void statistics(Row* rows, const Held* held, float* scratch) {}
__device__ __forceinline__ void before(Before& b, const Source& s, int j) {}
__device__ __forceinline__ void take(Held& h, const Source& s, int j) {
  const int k = j % PIECES * 8;
  if (j < M * PIECES && k < K) read8(h.e, s.x + (long long)(j / PIECES) * K + k); else zero8(h.e);
}
__device__ __forceinline__ void finish(float* f, const Held& h, const Before& b, const Row* rows, int j) {
  floats8(f, h.e);
}
"""

_GATED = """
constexpr bool STATISTICS = false;
struct Source { const @X@* x; @UP_MEMBER@};
struct Before {};
struct Held { Eight e, up; };
struct Row {};
template <int COUNT> __device__ __forceinline__ void statistics(Row* rows, const Held* held, float* scratch) {}
__device__ __forceinline__ void before(Before& b, const Source& s, int j) {}
__device__ __forceinline__ void take(Held& h, const Source& s, int j) {
  const int k = j % PIECES * 8;
  if (j < M * PIECES && k < K) {
    read8(h.e, s.x + (long long)(j / PIECES) * @WIDTH@ + @AT@ + k);
    if (@HAS_UP@) read8(h.up, @UP@ + (long long)(j / PIECES) * @UP_WIDTH@ + @UP_AT@ + k);
  } else {
    zero8(h.e);
    zero8(h.up);
  }
}
__device__ __forceinline__ void finish(float* f, const Held& h, const Before& b, const Row* rows, int j) {
  float u[8];
  floats8(f, h.e);
  if (@HAS_UP@) floats8(u, h.up);
  // Beyond K there are zeros, whatever the activation makes of zero.
  const bool inside = j < M * PIECES && j % PIECES * 8 < K;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float v = f[i];
    const float a = @ACT@;
    f[i] = !inside ? 0.f : @HAS_UP@ ? a * u[i] : a;
  }
}
"""

_NORM = """
constexpr bool STATISTICS = true;
struct Source { const @X@* x; @WEIGHT_MEMBER@@BIAS_MEMBER@};
struct Before { float w[8], b[8]; };
struct Held { Eight e; };
struct Row { float mean, scale; };
__device__ __forceinline__ void before(Before& b, const Source& s, int j) {
  const int k = j % PIECES * 8;
  const bool inside = j < M * PIECES && k < K;
#pragma unroll
  for (int i = 0; i < 8; ++i) { b.w[i] = 1.f; b.b[i] = 0.f; }
  if (!inside) return;
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    if (@HAS_WEIGHT@) {
      const uint4 w = __ldg(reinterpret_cast<const uint4*>(@WEIGHT@ + k + i));
      b.w[i] = gq_float(w.x) + @OFFSET@; b.w[i + 1] = gq_float(w.y) + @OFFSET@;
      b.w[i + 2] = gq_float(w.z) + @OFFSET@; b.w[i + 3] = gq_float(w.w) + @OFFSET@;
    }
    if (@HAS_BIAS@) {
      const uint4 w = __ldg(reinterpret_cast<const uint4*>(@BIAS@ + k + i));
      b.b[i] = gq_float(w.x); b.b[i + 1] = gq_float(w.y); b.b[i + 2] = gq_float(w.z); b.b[i + 3] = gq_float(w.w);
    }
  }
}
__device__ __forceinline__ void take(Held& h, const Source& s, int j) {
  const int k = j % PIECES * 8;
  if (j < M * PIECES && k < K) read8(h.e, s.x + (long long)(j / PIECES) * K + k); else zero8(h.e);
}
__device__ __forceinline__ float over_warps(const float* scratch, int m) {
  float v = 0.f;
#pragma unroll
  for (int w = 0; w < THREADS / 32; ++w) v += scratch[w * M + m];
  return v;
}
__device__ __forceinline__ float row_scale(const float* scratch, int m) {
  return rsqrtf(over_warps(scratch, m) * (1.f / K) + @EPS@);
}
// Adds v[m] up over the block, or leaves that to `row_scale`; scratch holds a float for each warp and row.
__device__ __forceinline__ void block_sums(float* v, float* scratch) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) v[m] += __shfl_xor_sync(0xffffffffu, v[m], offset);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32 * M + m] = v[m];
  }
  if (@FOLDED@) return;
  __syncthreads();
#pragma unroll
  for (int m = 0; m < M; ++m) v[m] = over_warps(scratch, m);
}
template <int COUNT>
__device__ __forceinline__ void statistics(Row* rows, const Held* held, float* scratch) {
  float total[M] = {};
  if (@CENTERED@) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      float f[8], s = 0.f;
      floats8(f, held[i].e);
#pragma unroll
      for (int e = 0; e < 8; ++e) s += f[e];
#pragma unroll
      for (int m = 0; m < M; ++m) total[m] += piece(i) / PIECES == m ? s : 0.f;
    }
    block_sums(total, scratch);
    __syncthreads();
  }
#pragma unroll
  for (int m = 0; m < M; ++m) { rows[m].mean = total[m] * (1.f / K); total[m] = 0.f; }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const int j = piece(i);
    float f[8];
    floats8(f, held[i].e);
#pragma unroll
    for (int m = 0; m < M; ++m)
      if (j / PIECES == m && j % PIECES * 8 < K) {
#pragma unroll
        for (int e = 0; e < 8; ++e) { const float d = f[e] - rows[m].mean; total[m] += d * d; }
      }
  }
  block_sums(total, scratch);
#pragma unroll
  for (int m = 0; m < M; ++m) rows[m].scale = @FOLDED@ ? 1.f : rsqrtf(total[m] * (1.f / K) + @EPS@);
}
__device__ __forceinline__ void finish(float* f, const Held& h, const Before& b, const Row* rows, int j) {
  float mean = 0.f, scale = 0.f;
  floats8(f, h.e);
#pragma unroll
  for (int m = 0; m < M; ++m)
    if (j / PIECES == m) { mean = rows[m].mean; scale = rows[m].scale; }
  const bool inside = j % PIECES * 8 < K;
#pragma unroll
  for (int i = 0; i < 8; ++i) f[i] = inside ? (f[i] - mean) * scale * b.w[i] + b.b[i] : 0.f;
}
"""
