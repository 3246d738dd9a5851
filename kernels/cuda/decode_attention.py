# SPDX-License-Identifier: Apache-2.0
"""Attention of one decode step in one kernel: rotary embedding, cache append, split-KV attention, combination.

For calls in which every token belongs to a sequence of its own, so that a token sees nothing that the same call
appends but its own key. A block serves one token and a few query heads that share a key head; S blocks, a cluster, cut
the context into stretches (flash decoding) and combine their sums through each other's shared memory. Groups of lanes
hold a key each, 16 bytes a lane, and run an online softmax (Dao et al. 2022, algorithm 1) over every GROUPS-th one.
"""

from __future__ import annotations

import zlib
from typing import Any

from gptq_compile.kernels.attention_params import AttentionParams, refuse_attention
from gptq_compile.kernels.cuda import launch, tile_source
from gptq_compile.kernels.cuda.stream_input import C_TYPES
from gptq_compile.kernels.registry import Case, Kernel, Refusal
from gptq_compile.kernels.script import Function, script
from gptq_compile.kernels.target import Target

THREADS = 256
KEYS = 4
"""Keys that a group of lanes loads before it uses the first."""
AT_ONCE = {1: 132, 2: 66, 4: 30, 8: 15}
"""Blocks of a cluster, up to as many as every sm_90 takes -> clusters that an H200 runs at once with one block on each
multiprocessor."""
MOST_OUTPUTS = 1024
"""Query heads of a block times head_dim: what shared memory holds for every warp."""
MOST_REGISTERS = 64


def _heads(p: AttentionParams) -> int:
    """Returns the query heads of a block."""
    fitting = [
        g
        for g in range(1, p.group + 1)
        if p.group % g == 0 and g * max(p.head_dim, p.v_head_dim) <= MOST_OUTPUTS and g * 8 <= MOST_REGISTERS
    ]
    return max(fitting, default=1)


def _division(case: Case, p: AttentionParams, target: Target) -> tuple[int, int]:
    """Returns (parts of a context, blocks that a multiprocessor is to have registers for).

    As many parts as let all clusters run at once: one more cluster than that waits for a whole turn of the others. Up
    to three heads leave room for two blocks on a multiprocessor. Four want more than the 128 registers that a thread
    has then, so it depends on whether there would be two parts or less without, and more with that; or whether clusters
    take turns anyway. One part where blocks cannot read each other's shared memory.
    """
    clusters = (case.rows or 1) * p.kv_heads * (p.group // _heads(p))
    if not launch.supported(target):
        return 1, 1

    def parts(resident: int) -> int:
        return max((s for s, most in AT_ONCE.items() if clusters <= most * resident), default=0)

    pays = parts(1) <= 2 and (parts(2) > parts(1) or parts(1) == 0)
    shared = _heads(p) <= 3 or (_heads(p) == 4 and pays)
    return max(parts(2 if shared else 1), 1), 2 if shared else 1


def _accepts(case: Case, target: Target) -> Refusal | None:
    refusal = refuse_attention(case)
    if refusal is not None:
        return refusal
    p = AttentionParams.of(case)
    if case.dtype != "float16":
        return Refusal(f"is for a float16 cache, not {case.dtype}")
    if case.rows is None:
        return Refusal("is for a number of tokens known at compile time, each of another sequence")
    for name, size in (("head_dim", p.head_dim), ("v_head_dim", p.v_head_dim)):
        if size % 8 or size > 256:
            return Refusal(f"needs a {name} that is a multiple of 8 up to 256, not {size}")
    if case["input_dtype"] not in C_TYPES:
        return Refusal(f"needs float32 or float16 queries, not {case['input_dtype']}")
    rotary = int(case["rotary_dim"])
    if rotary % 2 or rotary > p.head_dim:
        return Refusal(f"rotary_dim {rotary} is not an even number up to head_dim {p.head_dim}")
    blocks = case.rows * p.kv_heads * (p.group // _heads(p))
    if _division(case, p, target)[0] == 1 and blocks < AT_ONCE[1] // 2:
        return Refusal(f"{blocks} blocks leave multiprocessors idle, and the target has no clusters of blocks")
    return None


def _build(case: Case, target: Target) -> Any:
    ir = script()
    p = AttentionParams.of(case)
    rows: Any = case.rows  # known, or `_accepts` had refused
    (splits, resident), per_block = _division(case, p, target), _heads(p)
    name = f"gq_decode_attention_{zlib.crc32(repr((case, target)).encode()):08x}"
    dependent = launch.supported(target)
    rotary, dtype = int(case["rotary_dim"]), case["input_dtype"]
    with Function("decode_attention") as f:
        tensors = {key: f.tensor(key, (rows, int(case[f"{key}_width"])), dtype) for key in ("q", "k", "v")}
        if rotary:
            tensors |= {key: f.tensor(key, (rows, rotary), "float32") for key in ("cos", "sin")}
        pages, table = f.symbol(), f.symbol()
        tensors["positions"] = f.tensor("positions", (rows,), "int32")
        tensors["slots"] = f.tensor("slots", (rows,), "int32")
        tensors["sequences"] = f.tensor("sequences", (rows,), "int32")
        tensors["page_table"] = f.tensor("page_table", (f.symbol(), table), "int32")
        tensors["k_cache"] = f.tensor("k_cache", (pages, p.kv_heads, p.page_size, p.head_dim), "float16")
        tensors["v_cache"] = f.tensor("v_cache", (pages, p.kv_heads, p.page_size, p.v_head_dim), "float16")
        if p.has_sinks:
            tensors["sinks"] = f.tensor("sinks", (p.heads,), "float32")
        if p.has_alibi:
            tensors["slopes"] = f.tensor("slopes", (p.heads,), "float32")
        tensors["out"] = f.tensor("out", (rows, p.heads, p.v_head_dim), "float16")
        blocks = rows * p.kv_heads * (p.group // per_block) * splits
        written = ("out", "k_cache", "v_cache")

        def body() -> None:
            with ir.launch_thread("threadIdx.x", THREADS), ir.attr(0, launch.MIN_BLOCKS, resident):
                shared = ir.alloc_buffer((_shared_bytes(p, per_block),), "uint8", scope="shared.dyn")
                pointers = [t.access_ptr("rw" if key in written else "r") for key, t in tensors.items()]
                text = _source(name, case, p, per_block, splits, dependent)
                arguments = (*pointers, ir.cast(table, "int32"), shared.access_ptr("rw"))
                ir.evaluate(ir.cuda.func_call(f"{name}::run", *arguments, source_code=text, return_type="void"))

        with ir.launch_thread("blockIdx.x", blocks):
            if splits > 1:
                with ir.launch_thread("clusterCtaIdx.x", splits):
                    body()
            else:
                body()
    return launch.dependent(f.result()) if dependent else f.result()


def _shared_bytes(p: AttentionParams, per_block: int) -> int:
    """Returns the bytes of a block: queries, the new key and value, sums of every warp and of the block."""
    warps = THREADS // 32
    floats = per_block * p.head_dim + (warps + 1) * per_block * (p.v_head_dim + 2)
    return 4 * floats + 2 * (p.head_dim + p.v_head_dim)


def _source(name: str, case: Case, p: AttentionParams, per_block: int, splits: int, dependent: bool) -> str:
    rotary = int(case["rotary_dim"])
    lanes = 1
    while lanes * 8 < max(p.head_dim, p.v_head_dim):
        lanes *= 2
    constants = {
        "HEADS": p.heads, "KV_HEADS": p.kv_heads, "GROUP": p.group, "G": per_block, "D": p.head_dim,
        "DV": p.v_head_dim, "PAGE": p.page_size, "ROTARY": rotary, "S": splits, "THREADS": THREADS, "LANES": lanes,
        "U": KEYS, "WINDOW": p.window, **{
            f"{key.upper()}_{what.upper()}": int(case[f"{key}_{what}"])
            for key in ("q", "k", "v") for what in ("width", "at", "head")
        },
    }  # fmt: skip
    text = "\n".join(f"constexpr int {key} = {value};" for key, value in constants.items())
    score = f"v *= {p.scale!r}f;"
    if p.softcap:
        score += f" v = {p.softcap!r}f * tanhf(v * {1.0 / p.softcap!r}f);"
    if p.has_alibi:
        score += " v += slope[g] * float(j - position);"
    values = {
        "@X@": C_TYPES[case["input_dtype"]],
        "@ROTARY@": "const float* __restrict__ cos_table, const float* __restrict__ sin_table, " if rotary else "",
        "@ROTARY_PARAMETERS@": ", const float* cos_table, const float* sin_table" if rotary else "",
        "@ROTARY_ARGUMENTS@": ", cos_table, sin_table" if rotary else "",
        "@COS@": "cos_table[t * ROTARY + i]" if rotary else "1.f",
        "@SIN@": "sin_table[t * ROTARY + i]" if rotary else "0.f",
        "@PARTNER@": "i ^ 1" if case.get("interleaved") else "i < ROTARY / 2 ? i + ROTARY / 2 : i - ROTARY / 2",
        "@FIRST@": "i % 2 == 0" if case.get("interleaved") else "i < ROTARY / 2",
        "@SINKS@": "const float* __restrict__ sinks, " if p.has_sinks else "",
        "@SLOPES@": "const float* __restrict__ slopes, " if p.has_alibi else "",
        "@READ_SLOPES@": "slope[g] = slopes[head + g];" if p.has_alibi else "slope[g] = 0.f;",
        "@SCORE@": score,
        "@SINK@": "top = sinks[head + g]; total = 1.f;" if p.has_sinks else "",
        "@LET_NEXT_START@": "gq_let_next_start();" if dependent else "",
        "@WAIT_FOR_PREVIOUS@": "gq_wait_for_previous();" if dependent else "",
        "@CLUSTER_BARRIER@": "gq_cluster_barrier();" if splits > 1 else "__syncthreads();",
        "@REMOTE@": "gq_remote(p, rank)" if splits > 1 else "*p",
    }
    body = _BODY
    for key, value in values.items():
        body = body.replace(key, value)
    head = tile_source.PTX + tile_source.COMMON + (tile_source.LAUNCH if dependent else "")
    return f"{head}{tile_source.CLUSTER if splits > 1 else ''}\nnamespace {name} {{\n{text}\n{body}\n}}\n"


_BODY = """
constexpr int WARPS = THREADS / 32, GROUPS = THREADS / LANES;
constexpr float NONE = -1e30f;

__device__ __forceinline__ float other_block(const float* p, int rank) { return @REMOTE@; }

__device__ __forceinline__ void floats8(float* f, uint4 v) {
  const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) { float2 p = gq_floats(words[i]); f[2 * i] = p.x; f[2 * i + 1] = p.y; }
}

// Feature i of a head that begins at x, turned by the token's position.
__device__ __forceinline__ float turned(const @X@* x, int i, int t@ROTARY_PARAMETERS@) {
  float v = (float)x[i];
  if (i < ROTARY) {
    const float w = (float)x[@PARTNER@];
    v = v * @COS@ + (@FIRST@ ? -w : w) * @SIN@;
  }
  return v;
}

// The softmax state of G heads: maximum, sum, and eight features of the weighted values.
struct State { float m[G], l[G], o[G][8]; };

__device__ __forceinline__ void merge(State& s, int g, float m, float l, const float* o) {
  const float top = s.m[g] > m ? s.m[g] : m;
  const float mine = __expf(s.m[g] - top), theirs = __expf(m - top);
  s.m[g] = top;
  s.l[g] = s.l[g] * mine + l * theirs;
#pragma unroll
  for (int e = 0; e < 8; ++e) s.o[g][e] = s.o[g][e] * mine + o[e] * theirs;
}

__device__ __forceinline__ void run(const @X@* __restrict__ q, const @X@* __restrict__ k, const @X@* __restrict__ v_new,
                                    @ROTARY@const int* __restrict__ positions, const int* __restrict__ slots,
                                    const int* __restrict__ sequences, const int* __restrict__ page_table,
                                    half* k_cache, half* v_cache, @SINKS@@SLOPES@half* __restrict__ out, int table,
                                    unsigned char* shared) {
  const int part = blockIdx.x % S, head_block = blockIdx.x / S % (GROUP / G);
  const int h = blockIdx.x / (S * (GROUP / G)) % KV_HEADS, t = blockIdx.x / (S * (GROUP / G) * KV_HEADS);
  const int head = h * GROUP + head_block * G, lane = threadIdx.x % LANES;
  half* new_k = reinterpret_cast<half*>(shared);
  half* new_v = new_k + D;
  float* queries = reinterpret_cast<float*>(new_v + DV);
  float* warp_o = queries + G * D;
  float* warp_ml = warp_o + WARPS * G * DV;
  float* block_o = warp_ml + WARPS * G * 2;
  float* block_ml = block_o + G * DV;
  @LET_NEXT_START@

  // What is cached already; the token's own key comes from shared memory.
  const int position = positions[t];
  const int* pages = page_table + (long long)sequences[t] * table;
  const int first = WINDOW > 0 && position - (WINDOW - 1) > 0 ? position - (WINDOW - 1) : 0;
  const int span = (position - first + S - 1) / S, begin = first + part * span;
  const int end = begin + span < position ? begin + span : position;
  const int own = part == 0 ? 1 : 0, group = threadIdx.x / LANES;
  // Keys begin .. end - 1, and for the first part one more: number end stands for the token's own.
  const int turns = end > begin ? (end - begin + own + GROUPS * U - 1) / (GROUPS * U) : own;
  const int mine = (end > begin ? begin : end) + group;
  uint4 keys[U], values[U];
  auto request = [&](int start) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int j = start + u * GROUPS;
      keys[u] = values[u] = make_uint4(0u, 0u, 0u, 0u);
      if (j < end) {
        const long long row = ((long long)pages[j / PAGE] * KV_HEADS + h) * PAGE + j % PAGE;
        if (lane * 8 < D) keys[u] = gq_read16(k_cache + row * D + lane * 8);
        if (lane * 8 < DV) values[u] = gq_read16(v_cache + row * DV + lane * 8);
      }
    }
  };
  // Before the wait: positions, pages and what earlier steps cached were written before this step's first kernel.
  if (S > 1) request(mine);
  @WAIT_FOR_PREVIOUS@

  for (int i = threadIdx.x; i < G * D; i += THREADS)
    queries[i] = turned(q + (long long)t * Q_WIDTH + Q_AT + (head + i / D) * Q_HEAD, i % D, t@ROTARY_ARGUMENTS@);
  if (part == 0) {
    const int slot = slots[t];
    for (int i = threadIdx.x; i < D + DV; i += THREADS) {
      half value;
      if (i < D) value = (half)turned(k + (long long)t * K_WIDTH + K_AT + h * K_HEAD, i, t@ROTARY_ARGUMENTS@);
      else value = (half)v_new[(long long)t * V_WIDTH + V_AT + h * V_HEAD + i - D];
      new_k[i] = value;
      if (slot >= 0 && head_block == 0) {
        const long long row = ((long long)(slot / PAGE) * KV_HEADS + h) * PAGE + slot % PAGE;
        if (i < D) k_cache[row * D + i] = value; else v_cache[row * DV + i - D] = value;
      }
    }
  }
  __syncthreads();

  float x[G][8], slope[G];
  State s;
#pragma unroll
  for (int g = 0; g < G; ++g) {
    @READ_SLOPES@
    s.m[g] = NONE;
    s.l[g] = 0.f;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      x[g][e] = lane * 8 < D ? queries[g * D + (lane * 8 < D ? lane * 8 : 0) + e] : 0.f;
      s.o[g][e] = 0.f;
    }
  }
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    const int start = mine + turn * GROUPS * U;
    if (S == 1 || turn > 0) request(start);
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (own && start + u * GROUPS == end) {
        if (lane * 8 < D) keys[u] = *reinterpret_cast<const uint4*>(new_k + lane * 8);
        if (lane * 8 < DV) values[u] = *reinterpret_cast<const uint4*>(new_v + lane * 8);
      }
    float scores[G][U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      float f[8];
      floats8(f, keys[u]);
#pragma unroll
      for (int g = 0; g < G; ++g) {
        float v = 0.f;
#pragma unroll
        for (int e = 0; e < 8; ++e) v += x[g][e] * f[e];
#pragma unroll
        for (int offset = LANES / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
        const int number = start + u * GROUPS, j = number == end ? position : number;
        @SCORE@
        scores[g][u] = number < end + own ? v : NONE;
      }
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
      float top = s.m[g];
#pragma unroll
      for (int u = 0; u < U; ++u) top = scores[g][u] > top ? scores[g][u] : top;
      const float scale = __expf(s.m[g] - top);
      s.m[g] = top;
      s.l[g] *= scale;
#pragma unroll
      for (int e = 0; e < 8; ++e) s.o[g][e] *= scale;
#pragma unroll
      for (int u = 0; u < U; ++u) {
        // A group without any key yet has the maximum NONE, and exp(NONE - NONE) is 1.
        scores[g][u] = start + u * GROUPS < end + own ? __expf(scores[g][u] - top) : 0.f;
        s.l[g] += scores[g][u];
      }
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      float f[8];
      floats8(f, values[u]);
#pragma unroll
      for (int g = 0; g < G; ++g)
#pragma unroll
        for (int e = 0; e < 8; ++e) s.o[g][e] += scores[g][u] * f[e];
    }
  }

  // Groups of a warp, then warps, then blocks.
#pragma unroll
  for (int offset = LANES; offset < 32; offset *= 2)
#pragma unroll
    for (int g = 0; g < G; ++g) {
      float o[8];
      const float m = __shfl_xor_sync(0xffffffffu, s.m[g], offset), l = __shfl_xor_sync(0xffffffffu, s.l[g], offset);
#pragma unroll
      for (int e = 0; e < 8; ++e) o[e] = __shfl_xor_sync(0xffffffffu, s.o[g][e], offset);
      merge(s, g, m, l, o);
    }
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int g = 0; g < G; ++g) {
    if (threadIdx.x % 32 < LANES && lane * 8 < DV)
#pragma unroll
      for (int e = 0; e < 8; ++e) warp_o[(warp * G + g) * DV + lane * 8 + e] = s.o[g][e];
    if (threadIdx.x % 32 == 0) {
      warp_ml[(warp * G + g) * 2] = s.m[g];
      warp_ml[(warp * G + g) * 2 + 1] = s.l[g];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < G * DV; i += THREADS) {
    const int g = i / DV;
    float top = NONE, total = 0.f, sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) top = warp_ml[(w * G + g) * 2] > top ? warp_ml[(w * G + g) * 2] : top;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float scale = __expf(warp_ml[(w * G + g) * 2] - top);
      total += warp_ml[(w * G + g) * 2 + 1] * scale;
      sum += warp_o[(w * G + g) * DV + i % DV] * scale;
    }
    block_o[i] = sum;
    if (i % DV == 0) {
      block_ml[g * 2] = top;
      block_ml[g * 2 + 1] = total;
    }
  }
  @CLUSTER_BARRIER@
  for (int i = threadIdx.x * S + part; i < G * DV; i += S * THREADS) {
    const int g = i / DV;
    float top = NONE, total = 0.f, sum = 0.f;
    @SINK@
#pragma unroll
    for (int rank = 0; rank < S; ++rank) {
      const float m = other_block(block_ml + g * 2, rank), larger = m > top ? m : top;
      const float mine = __expf(top - larger), theirs = __expf(m - larger);
      total = total * mine + other_block(block_ml + g * 2 + 1, rank) * theirs;
      sum = sum * mine + other_block(block_o + i, rank) * theirs;
      top = larger;
    }
    out[((long long)t * HEADS + head + g) * DV + i % DV] = (half)(sum / total);
  }
  // No block may end while another reads its shared memory.
  @CLUSTER_BARRIER@
}
"""

KERNELS = (Kernel("cuda.decode_attention", "decode_attention", _accepts, _build),)
