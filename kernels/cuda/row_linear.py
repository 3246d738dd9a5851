# SPDX-License-Identifier: Apache-2.0
"""Few rows times half weights as they lie in a row-major matrix: a language-model head, or any linear not quantized.

Reading the weights is all there is to it. A block stays on its multiprocessor and takes tiles of 16 weight rows in
turn; S warps share the K of a tile and T tiles are under way side by side. Every lane copies the 16-byte pieces that
it will multiply itself into its own part of a ring in shared memory (cp.async), D - 1 turns ahead and across tiles, so
that some hundred kilobytes a multiprocessor are under way and nothing but the end of a tile needs a barrier. In a
chain of dependent launches the first turns are requested before the kernel in front has ended.

Tensor cores multiply: weights are the 16-row operand, and since the order of the summed index is free as long as both
operands agree, lane (g, c) takes the eight k from 8 c on of rows g and g + 8 and of token g. Sums are float32. Where
all activations would leave no room for rings, K is taken in parts: each one's activations are staged in turn, and what
a part adds to each tile waits in shared memory.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from gptq_compile.kernels.cuda import launch, stream, tile_linear, tile_source
from gptq_compile.kernels.registry import Case, Refusal
from gptq_compile.kernels.script import Function, script
from gptq_compile.kernels.target import Target

MAX_ROWS = 16
UNIT = 64
"""Codes of a row that a warp takes at once: 2 KiB of 16 rows."""
TYPES = {"float16": "half", "bfloat16": "nv_bfloat16", "float32": "float"}
WARPS = 8


@dataclass(frozen=True)
class Config:
    """How the work is divided.

    Attributes:
        tiles: T, tiles of 16 rows that a block has under way at once.
        splits: S, warps that share a tile's K.
        units: U, units of 64 k that a warp takes in one turn.
        depth: D, slots of a warp's ring.
        early: turns that are requested before the activations.
        parts: P, parts of K that are taken one after another.
    """

    tiles: int
    splits: int
    units: int
    depth: int
    early: int = 1
    parts: int = 1

    @property
    def warps(self) -> int:
        return self.tiles * self.splits

    @property
    def slot_bytes(self) -> int:
        """Bytes of a turn of one warp."""
        return self.units * UNIT * 32


def shared_bytes(rows: int, out_features: int, in_features: int, config: Config) -> int:
    """Returns the shared memory of a block: rings, activations, sums of the warps for two tiles, sums of parts."""
    ring = config.warps * config.depth * config.slot_bytes
    partial = 2 * config.warps * 512 * -(-rows // 8)
    kept = -(-_each(out_features) // config.tiles) * config.tiles * 64 * rows if config.parts > 1 else 0
    return ring + rows * _stride(in_features, config) * 2 + partial + kept


def _each(out_features: int) -> int:
    """Returns the most tiles that a block takes."""
    return -(-out_features // (16 * stream.BLOCKS))


def _turns(in_features: int, config: Config) -> int:
    """Returns the turns that a warp takes for a part of a tile."""
    return -(-in_features // (config.splits * config.units * UNIT * config.parts))


def _stride(in_features: int, config: Config) -> int:
    """Returns the halves from one row of staged activations to the next: whole turns, and half of all banks."""
    return _turns(in_features, config) * config.splits * config.units * UNIT + 32


def choose(rows: int, out_features: int, in_features: int, archs: tuple[str, ...], dependent: bool) -> Config | None:
    """Returns the division of the work for the smallest shared memory of `archs`, or None if nothing fits.

    Eight warps, that share one tile where K is long enough for four turns of each. Measured on an H200
    (benchmarks/RESULTS.md, "Half weights").
    """
    limit = min(stream.limits(archs)) - stream.RESERVED
    each = _each(out_features)
    units = -(-in_features // UNIT)
    tiles = next(t for t in (1, 2, 4, 8) if t == 8 or units * t >= 64 or 2 * t > each)
    for parts, unit in itertools.product((1, 2, 4, 8), (2, 1)):
        config = Config(tiles, max(1, min(WARPS // tiles, units // unit)), unit, 2, parts=parts)
        turns = _turns(in_features, config) * parts * -(-each // tiles)
        spare = limit - shared_bytes(rows, out_features, in_features, config)
        depth = min(2 + spare // (config.warps * config.slot_bytes), turns + 1, 6)
        if spare >= 0 and (depth >= 4 or depth > turns or (unit == 1 and depth == 3)):
            return dataclasses.replace(config, depth=depth, early=min(3, depth - 1) if dependent else 0)
    return None


def accepts(case: Case, target: Target) -> Refusal | None:
    """Refuses many or symbolic rows, types that tensor cores do not multiply here, and activations without room."""
    if case.rows is None or case.rows > MAX_ROWS:
        return Refusal(f"is for 1 to {MAX_ROWS} rows known at compile time, not {case.rows or 'symbolic'}")
    if case.dtype not in ("float16", "bfloat16"):
        return Refusal(f"needs float16 or bfloat16 activations, not {case.dtype}")
    weight, out = case.get("weight_dtype", case.dtype), case.get("out_dtype", case.dtype)
    if weight != case.dtype:
        return Refusal(f"needs weights of the activations' type {case.dtype}, not {weight}")
    if out not in (case.dtype, "float32"):
        return Refusal(f"stores {case.dtype} or float32, not {out}")
    if case["in_features"] % 8:
        return Refusal(f"needs in_features to be a multiple of 8, not {case['in_features']}")
    if choose(case.rows, case["out_features"], case["in_features"], target.archs, launch.supported(target)) is None:
        return Refusal(f"{case.rows} rows of {case['in_features']} leave too little shared memory for weights")
    return None


_BODY = """
constexpr int TILES = (N + 15) / 16, NT = (M + 7) / 8, PART = TURNS * S * U * 64, STRIDE = PART + 32;
constexpr int SLOT = U * 2048, X_AT = T * S * D * SLOT, PARTIAL_AT = X_AT + M * STRIDE * 2;
constexpr int KEPT_AT = PARTIAL_AT + 2 * T * S * NT * 512, EACH = (TILES + T * BLOCKS - 1) / (T * BLOCKS);
constexpr bool WHOLE = K == P * PART;

__device__ __forceinline__ uint4 at16(const void* p) { return *reinterpret_cast<const uint4*>(p); }

__device__ __forceinline__ void run(const @X@* __restrict__ x, const @X@* __restrict__ w, @BIAS@
                                    @OUT@* __restrict__ out, unsigned char* shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int split = warp % S, group = warp / S, first = group * BLOCKS + blockIdx.x;
  unsigned char* ring = shared + warp * D * SLOT + lane * 16;
  @X@* staged = reinterpret_cast<@X@*>(shared + X_AT);
  float* partial = reinterpret_cast<float*>(shared + PARTIAL_AT) + group * (2 * S * NT * 128);
  float* kept = reinterpret_cast<float*>(shared + KEPT_AT) + group * (EACH * 16 * M);
  @LET_NEXT_START@

  // The next tile, turn and part to be requested, and where rows g and g + 8 of that tile begin. Row N - 1 is read for
  // those beyond.
  int ahead = first, turn_ahead = 0, part_ahead = 0, slot = 0;
  const @X@ *low, *high;
  auto aim = [&]() {
    const int row = ahead * 16 + g;
    low = w + (long long)(N % 16 == 0 || row < N ? row : N - 1) * K + 8 * c;
    high = w + (long long)(N % 16 == 0 || row + 8 < N ? row + 8 : N - 1) * K + 8 * c;
  };
  aim();
  auto fetch = [&]() {
    if (ahead < TILES) {
      unsigned char* to = ring + slot * SLOT;
      const int begin = part_ahead * PART + (turn_ahead * S + split) * (U * 64);
#pragma unroll
      for (int i = 0; i < 2 * U; ++i) {
        const int k = begin + i * 32;
        const bool there = WHOLE || k + 8 * c < K;
        @COPY@(to + i * 1024, there ? low + k : w, there);
        @COPY@(to + i * 1024 + 512, there ? high + k : w, there);
      }
      if (++turn_ahead == TURNS) {
        turn_ahead = 0;
        ahead += T * BLOCKS;
        if (ahead >= TILES && ++part_ahead < P) ahead = first;
        if (ahead < TILES) aim();
      }
    }
    gq_commit();
    slot = slot + 1 == D ? 0 : slot + 1;
  };
#pragma unroll
  for (int i = 0; i < EARLY; ++i) fetch();

  // Activations of a part, with zeros beyond K.
  auto stage = [&](int part) {
#pragma unroll 4
    for (int j = threadIdx.x; j < M * (PART / 8); j += T * S * 32) {
      const int token = j / (PART / 8), at = j % (PART / 8) * 8, k = part * PART + at;
      gq_copy16_or_zero(staged + token * STRIDE + at, k < K ? x + (long long)token * K + k : x, k < K);
    }
    gq_commit();
  };
  @WAIT_FOR_PREVIOUS@
  stage(0);
#pragma unroll
  for (int i = EARLY; i < D - 1; ++i) fetch();
  gq_wait<D - 1 - EARLY>();
  __syncthreads();

  const @X@* columns[NT];
#pragma unroll
  for (int t = 0; t < NT; ++t)
    columns[t] = staged + (t * 8 + g < M ? t * 8 + g : M - 1) * STRIDE + 8 * c + split * (U * 64);
  int use = 0, parity = 0;
#pragma unroll 1
  for (int part = 0; part < P; ++part) {
  if (part > 0) {
    __syncthreads();
    stage(part);
    gq_wait<0>();
    __syncthreads();
  }
#pragma unroll 1
  for (int tile = first; tile < TILES; tile += T * BLOCKS) {
    float total[2][NT][4] = {};
#pragma unroll 1
    for (int turn = 0; turn < TURNS; ++turn) {
      gq_wait<D - 2>();
      const unsigned char* data = ring + use * SLOT;
      use = use + 1 == D ? 0 : use + 1;
      // Into the slot of the turn before.
      fetch();
#pragma unroll
      for (int i = 0; i < 2 * U; ++i) {
        const uint4 a = at16(data + i * 1024), b = at16(data + i * 1024 + 512);
        const unsigned even[4] = {a.x, b.x, a.y, b.y}, odd[4] = {a.z, b.z, a.w, b.w};
#pragma unroll
        for (int t = 0; t < NT; ++t) {
          const uint4 v = at16(columns[t] + turn * (S * U * 64) + i * 32);
          @MMA@(total[0][t], even, v.x, v.y);
          @MMA@(total[1][t], odd, v.z, v.w);
        }
      }
    }
    // What the tile before left here has been read by all that are past the barrier after it.
    float* own = partial + (parity * S + split) * (NT * 128) + lane * 4;
#pragma unroll
    for (int t = 0; t < NT; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) own[t * 128 + i] = total[0][t][i] + total[1][t][i];
    if (S == 1) __syncwarp(); else gq_barrier(1 + group, S * 32);
#pragma unroll
    for (int j = split * 32 + lane; j < 16 * M; j += S * 32) {
      const int token = j / 16, row = tile * 16 + j % 16;
      const float* from = partial + parity * S * (NT * 128) + token / 8 * 128 + (j % 8 * 4 + token % 8 / 2) * 4
                          + j % 16 / 8 * 2 + token % 2;
      float v = 0.f;
#pragma unroll
      for (int s = 0; s < S; ++s) v += from[s * (NT * 128)];
      if (P > 1) {  // the same thread every time
        float& sum = kept[tile / (T * BLOCKS) * (16 * M) + j];
        if (part > 0) v += sum;
        if (part < P - 1) sum = v;
      }
      if (part == P - 1 && (N % 16 == 0 || row < N)) {
        @ADD_BIAS@
        out[(long long)token * N + row] = (@OUT@)v;
      }
    }
    parity ^= 1;
  }
  }
}
"""


def source(name: str, case: Case, config: Config, dependent: bool, copy: str = "gq_copy16_or_zero") -> str:
    """Returns CUDA text with ``name::run(x, w, [bias], out, shared)``."""
    constants = {
        "K": case["in_features"], "N": case["out_features"], "M": case.rows, "BLOCKS": stream.BLOCKS,
        "T": config.tiles, "S": config.splits, "U": config.units, "D": config.depth, "EARLY": config.early,
        "P": config.parts, "TURNS": _turns(case["in_features"], config),
    }  # fmt: skip
    kind = TYPES[case.dtype]
    values = {
        "@LET_NEXT_START@": "gq_let_next_start();" if dependent else "",
        "@WAIT_FOR_PREVIOUS@": "gq_wait_for_previous();" if dependent else "",
        "@BIAS@": f"const {kind}* __restrict__ bias," if case["has_bias"] else "",
        "@ADD_BIAS@": "v += float(bias[row]);" if case["has_bias"] else "",
        "@MMA@": "gq_mma4" if case.dtype == "float16" else "gq_mma4_bf16",
        "@X@": kind,
        "@OUT@": TYPES[case.get("out_dtype", case.dtype)],
        "@COPY@": copy,
    }
    body = _BODY
    for key, value in values.items():
        body = body.replace(key, value)
    text = "\n".join(f"constexpr int {key} = {value};" for key, value in constants.items())
    head = tile_source.PTX + tile_source.COMMON + (tile_source.LAUNCH if dependent else "")
    return f"{head}\nnamespace {name} {{\n{text}\n{body}\n}}\n"


def build(case: Case, target: Target, config: Config | None = None) -> Any:
    """Builds the kernel for few rows known at compile time, divided as `config` says or as `choose` does."""
    ir = script()
    n, k, rows = case["out_features"], case["in_features"], case.rows
    dependent = launch.supported(target)
    assert rows is not None
    config = config or choose(rows, n, k, target.archs, dependent)
    assert config is not None
    name = tile_linear.name_of("rows", case, target, config)
    with Function("linear") as f:
        tensors = {"x": f.tensor("x", (rows, k), case.dtype), "w": f.tensor("w", (n, k), case.dtype)}
        if case["has_bias"]:
            tensors["bias"] = f.tensor("bias", (n,), case.dtype)
        tensors["out"] = f.tensor("out", (rows, n), case.get("out_dtype", case.dtype))
        needed = max(shared_bytes(rows, n, k, config), stream.alone_bytes(target.archs) if dependent else 0)
        with (
            ir.launch_thread("blockIdx.x", min(stream.BLOCKS, -(-n // 16))),
            ir.launch_thread("threadIdx.x", 32 * config.warps),
            ir.attr(0, launch.MIN_BLOCKS, 1),
        ):
            shared = ir.alloc_buffer((needed,), "uint8", scope="shared.dyn")
            tile_linear.run(name, source(name, case, config, dependent), tensors, shared.access_ptr("rw"))
    return launch.dependent(f.result()) if dependent else f.result()
