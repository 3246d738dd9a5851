# SPDX-License-Identifier: Apache-2.0
"""Paged attention of many tokens on tensor cores (flash attention: Dao et al. 2022, algorithm 1; Dao 2023, section 3).

A block serves 64 query rows: the query heads of some tokens in a row that share a key head, so that a key is read once
for all of them. Its four warps hold sixteen rows each, with queries and weighted values in registers, and take 64 keys
at a time from two stages in shared memory (cp.async): scores by mma.m16n8k16, an online softmax in float32, and the
weights, as halves, times the values by mma again.

Tokens need not belong to one sequence. A block takes its tokens run by run, a run being neighbours in one sequence, and
goes over the keys of each run; rows of other tokens see none of them.
"""

from __future__ import annotations

import zlib
from typing import Any

from gptq_compile.kernels.attention_params import AttentionParams, refuse_attention
from gptq_compile.kernels.cuda import tile_source
from gptq_compile.kernels.registry import Case, Kernel, Refusal
from gptq_compile.kernels.script import Function, script
from gptq_compile.kernels.target import Target

ROWS = 64
KEYS = 64
THREADS = 128
MOST_HEADS = 16
"""Query heads of a block; so at least four tokens share the keys that it reads."""
MOST_DIM = 128


def _heads(p: AttentionParams) -> int:
    """Returns the query heads of a block: the largest divisor of the group that is small enough."""
    return max(size for size in range(1, min(p.group, MOST_HEADS) + 1) if p.group % size == 0)


def _accepts(case: Case, target: Target) -> Refusal | None:
    refusal = refuse_attention(case)
    if refusal is not None:
        return refusal
    p = AttentionParams.of(case)
    if case.dtype != "float16":
        return Refusal(f"multiplies float16 on tensor cores, not {case.dtype}")
    if case.rows is not None:
        return Refusal(f"is for any number of tokens, and the {case.rows} of this case are few")
    for name, size in (("head_dim", p.head_dim), ("v_head_dim", p.v_head_dim)):
        if size % 16 or size > MOST_DIM:
            return Refusal(f"needs a {name} that is a multiple of 16 up to {MOST_DIM}, not {size}")
    return None


def shared_bytes(p: AttentionParams) -> int:
    """Returns the bytes of a block: two stages of keys and values, rows padded by 16 bytes, then the tokens' places."""
    return 2 * KEYS * (p.head_dim + p.v_head_dim + 16) * 2 + 2 * ROWS * 4


def _build(case: Case, target: Target) -> Any:
    ir = script()
    p = AttentionParams.of(case)
    per_block = _heads(p)
    name = f"gq_prefill_attention_{zlib.crc32(repr(case).encode()):08x}"
    with Function("paged_attention") as f:
        n, pages, table = f.symbol("n"), f.symbol("pages"), f.symbol("table")
        tensors = {
            "q": f.tensor("q", (n, p.heads, p.head_dim), "float16"),
            "k_cache": f.tensor("k_cache", (pages, p.kv_heads, p.page_size, p.head_dim), "float16"),
            "v_cache": f.tensor("v_cache", (pages, p.kv_heads, p.page_size, p.v_head_dim), "float16"),
            "positions": f.tensor("positions", (n,), "int32"),
            "sequences": f.tensor("seq_of_token", (n,), "int32"),
            "page_table": f.tensor("page_table", (f.symbol("sequences"), table), "int32"),
        }
        if p.has_sinks:
            tensors["sinks"] = f.tensor("sinks", (p.heads,), "float32")
        if p.has_alibi:
            tensors["slopes"] = f.tensor("alibi_slopes", (p.heads,), "float32")
        tensors["out"] = f.tensor("out", (n, p.heads, p.v_head_dim), "float16")
        tokens = ROWS // per_block
        tiles = ir.cast((n + tokens - 1) // tokens, "int32")
        with (
            ir.launch_thread("blockIdx.x", tiles * (p.heads // per_block)),
            ir.launch_thread("threadIdx.x", THREADS),
        ):
            shared = ir.alloc_buffer((shared_bytes(p),), "uint8", scope="shared.dyn")
            pointers = [t.access_ptr("w" if key == "out" else "r") for key, t in tensors.items()]
            arguments = (*pointers, ir.cast(n, "int32"), ir.cast(table, "int32"), shared.access_ptr("rw"))
            text = _source(name, p, per_block)
            ir.evaluate(ir.cuda.func_call(f"{name}::run", *arguments, source_code=text, return_type="void"))
    return f.result()


def _source(name: str, p: AttentionParams, per_block: int) -> str:
    """Returns CUDA text with ``name::run``, with the PrimFunc's parameters, n, width of the table, shared."""
    constants = {
        "HEADS": p.heads, "KV_HEADS": p.kv_heads, "GROUP": p.group, "G": per_block, "D": p.head_dim,
        "DV": p.v_head_dim, "PAGE": p.page_size, "WINDOW": p.window, "ROWS": ROWS, "KEYS": KEYS, "THREADS": THREADS,
    }  # fmt: skip
    text = "\n".join(f"constexpr int {key} = {value};" for key, value in constants.items())
    score = f"v *= {p.scale!r}f;"
    if p.softcap:
        score += f" v = {p.softcap!r}f * tanhf(v * {1.0 / p.softcap!r}f);"
    if p.has_alibi:
        score += " v += slope[i] * float(j - last[i]);"
    values = {
        "@SINKS@": "const float* __restrict__ sinks, " if p.has_sinks else "",
        "@SLOPES@": "const float* __restrict__ slopes, " if p.has_alibi else "",
        "@READ_SLOPE@": "slope[i] = slopes[own_head];" if p.has_alibi else "",
        "@READ_SINK@": "m[i] = sinks[own_head]; l[i] = c == 0 ? 1.f : 0.f;" if p.has_sinks else "",
        "@SCORE@": score,
    }
    body = _BODY
    for key, value in values.items():
        body = body.replace(key, value)
    return f"{tile_source.PTX}{tile_source.COMMON}\nnamespace {name} {{\n{text}\n{body}\n}}\n"


_BODY = """
constexpr int TOKENS = ROWS / G, LINE = D + 8, V_LINE = DV + 8;
constexpr float NONE = -1e30f;

__device__ __forceinline__ void run(const half* __restrict__ q, const half* __restrict__ k_cache,
                                    const half* __restrict__ v_cache, const int* __restrict__ positions,
                                    const int* __restrict__ sequences, const int* __restrict__ page_table,
                                    @SINKS@@SLOPES@half* __restrict__ out, int n, int table, unsigned char* shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  constexpr int PARTS = GROUP / G;
  // The last tokens see most: their blocks start first.
  const int tiles = (n + TOKENS - 1) / TOKENS, tile = tiles - 1 - (int)blockIdx.x / (KV_HEADS * PARTS);
  const int h = blockIdx.x / PARTS % KV_HEADS, head = h * GROUP + blockIdx.x % PARTS * G;
  const int first_token = tile * TOKENS, count = n - first_token < TOKENS ? n - first_token : TOKENS;
  half* keys = reinterpret_cast<half*>(shared);
  half* values = keys + 2 * KEYS * LINE;
  int* position = reinterpret_cast<int*>(values + 2 * KEYS * V_LINE);
  int* sequence = position + ROWS;
  if (threadIdx.x < count) {
    position[threadIdx.x] = positions[first_token + threadIdx.x];
    sequence[threadIdx.x] = sequences[first_token + threadIdx.x];
  }

  // The two rows of this lane: token, head, query, and the state of the softmax.
  int token[2];
  float m[2] = {NONE, NONE}, l[2] = {0.f, 0.f}, slope[2] = {0.f, 0.f}, o[DV / 8][4] = {};
  unsigned query[D / 16][4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp * 16 + g + 8 * i, own_head = head + row % G;
    token[i] = row / G;
    const bool valid = token[i] < count;
    @READ_SLOPE@
    @READ_SINK@
    const half* from = q + ((long long)(first_token + (valid ? token[i] : 0)) * HEADS + own_head) * D + 2 * c;
#pragma unroll
    for (int s = 0; s < D / 16; ++s) {
      query[s][i] = valid ? __ldg(reinterpret_cast<const unsigned*>(from + s * 16)) : 0u;
      query[s][2 + i] = valid ? __ldg(reinterpret_cast<const unsigned*>(from + s * 16 + 8)) : 0u;
    }
  }
  __syncthreads();

  int begin = 0;
#pragma unroll 1
  while (begin < count) {
    int end = begin + 1;
    while (end < count && sequence[end] == sequence[begin] && position[end] == position[end - 1] + 1) ++end;
    const int* pages = page_table + (long long)sequence[begin] * table;
    const int low = WINDOW > 0 && position[begin] >= WINDOW ? position[begin] - (WINDOW - 1) : 0;
    const int high = position[end - 1] + 1, turns = (high - low + KEYS - 1) / KEYS;
    // The keys that a row sees: first to last, its own place.
    int first[2], last[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool mine = token[i] >= begin && token[i] < end;
      last[i] = mine ? position[token[i]] : -1;
      first[i] = WINDOW > 0 && last[i] >= WINDOW ? last[i] - (WINDOW - 1) : 0;
    }
    auto fetch = [&](int turn) {
#pragma unroll 2
      for (int at = 0; at < KEYS * (D + DV) / 8; at += THREADS) {
        // Pieces of sixteen bytes, keys before values.
        const int piece = at + threadIdx.x;
        if (piece >= KEYS * (D + DV) / 8) break;
        const bool value = piece >= KEYS * D / 8;
        const int place = value ? piece - KEYS * D / 8 : piece, width = value ? DV / 8 : D / 8;
        const int key = place / width, j = low + turn * KEYS + key, safe = j < high ? j : high - 1;
        const long long row = ((long long)__ldg(pages + safe / PAGE) * KV_HEADS + h) * PAGE + safe % PAGE;
        const half* from = value ? v_cache + row * DV : k_cache + row * D;
        half* to = value ? values + (turn % 2 * KEYS + key) * V_LINE : keys + (turn % 2 * KEYS + key) * LINE;
        gq_copy16_or_zero(to + place % width * 8, from + place % width * 8, j < high);
      }
      gq_commit();
    };
    if (turns > 0) fetch(0);
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {
      if (turn + 1 < turns) fetch(turn + 1); else gq_commit();
      gq_wait<1>();
      __syncthreads();
      const half* k = keys + turn % 2 * KEYS * LINE + (lane / 16 * 8 + lane % 8) * LINE + lane / 8 % 2 * 8;
      float scores[KEYS / 8][4] = {};
#pragma unroll
      for (int s = 0; s < D / 16; ++s)
#pragma unroll
        for (int t = 0; t < KEYS / 8; t += 2) {
          unsigned b[4];
          gq_matrices(b, k + t * 8 * LINE + s * 16);
          gq_mma4(scores[t], query[s], b[0], b[1]);
          gq_mma4(scores[t + 1], query[s], b[2], b[3]);
        }
      float top[2] = {m[0], m[1]};
#pragma unroll
      for (int t = 0; t < KEYS / 8; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = e / 2, j = low + turn * KEYS + t * 8 + 2 * c + e % 2;
          float v = scores[t][e];
          @SCORE@
          v = j >= first[i] && j <= last[i] ? v : -INFINITY;
          scores[t][e] = v;
          top[i] = fmaxf(top[i], v);
        }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffffu, top[i], 1));
        top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffffu, top[i], 2));
        const float scale = __expf(m[i] - top[i]);
        m[i] = top[i];
        l[i] *= scale;
#pragma unroll
        for (int t = 0; t < DV / 8; ++t) { o[t][2 * i] *= scale; o[t][2 * i + 1] *= scale; }
      }
#pragma unroll
      for (int t = 0; t < KEYS / 8; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          scores[t][e] = __expf(scores[t][e] - m[e / 2]);
          l[e / 2] += scores[t][e];
        }
      const half* v = values + turn % 2 * KEYS * V_LINE + lane % 16 * V_LINE + lane / 16 * 8;
#pragma unroll
      for (int s = 0; s < KEYS / 16; ++s) {
        const unsigned a[4] = {
            gq_pair(scores[2 * s][0], scores[2 * s][1]), gq_pair(scores[2 * s][2], scores[2 * s][3]),
            gq_pair(scores[2 * s + 1][0], scores[2 * s + 1][1]), gq_pair(scores[2 * s + 1][2], scores[2 * s + 1][3])};
#pragma unroll
        for (int t = 0; t < DV / 8; t += 2) {
          unsigned b[4];
          gq_matrices_turned(b, v + s * 16 * V_LINE + t * 8);
          gq_mma4(o[t], a, b[0], b[1]);
          gq_mma4(o[t + 1], a, b[2], b[3]);
        }
      }
      __syncthreads();
    }
    gq_wait<0>();
    begin = end;
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    l[i] += __shfl_xor_sync(0xffffffffu, l[i], 1);
    l[i] += __shfl_xor_sync(0xffffffffu, l[i], 2);
    // A token in no place (a negative position) sees nothing.
    const float scale = l[i] > 0.f ? 1.f / l[i] : 0.f;
    const int row = warp * 16 + g + 8 * i;
    if (token[i] >= count) continue;
    half* to = out + ((long long)(first_token + token[i]) * HEADS + head + row % G) * DV + 2 * c;
#pragma unroll
    for (int t = 0; t < DV / 8; ++t)
      *reinterpret_cast<unsigned*>(to + t * 8) = gq_pair(o[t][2 * i] * scale, o[t][2 * i + 1] * scale);
  }
}
"""

KERNELS = (Kernel("cuda.paged_attention.flash", "paged_attention", _accepts, _build),)
