# SPDX-License-Identifier: Apache-2.0
"""CUDA text shared by the kernels over `FragmentTiles`: a few PTX instructions, and codes to mma fragments.

`fragments` masks codes out as subnormal halves, code * 2**(t - 24) with one t per row half (`exponent`): one logic
instruction for two codes, and the multiplication with activations is exact in float32. `integers` makes the exact
halves code - zero, which costs one more instruction but spares the kernel the sums of the activations.
"""

from __future__ import annotations

from gptq_compile.kernels.fragments import STEPS, lane_fields

PTX = """
#ifndef GQ_PTX
#define GQ_PTX
__device__ __forceinline__ void gq_mma4(float* d, const unsigned* a, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void gq_mma4_bf16(float* d, const unsigned* a, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Unsigned bytes times signed ones; d = c + a b.
__device__ __forceinline__ void gq_mma_bytes(unsigned* d, const unsigned* a, unsigned b0, unsigned b1,
                                             const unsigned* c) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}
// The larger magnitude; what is no number wins.
__device__ __forceinline__ float gq_largest(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(fabsf(a)), "f"(fabsf(b)));
  return r;
}
// (v & mask) | more in one instruction, which the compiler does not find where both are constants.
__device__ __forceinline__ unsigned gq_and_or(unsigned v, unsigned mask, unsigned more) {
  unsigned r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(v), "r"(mask), "r"(more));
  return r;
}
// Sixteen bytes from global to shared memory, past L1, without a register; visible after gq_wait and a barrier.
__device__ __forceinline__ void gq_copy16(void* to, const void* from) {
  unsigned address = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
// Sixteen bytes as by gq_copy16, or sixteen zero bytes; `from` must be an address either way.
__device__ __forceinline__ void gq_copy16_or_zero(void* to, const void* from, bool wanted) {
  unsigned address = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               ::"r"(address), "l"(from), "r"(wanted ? 16 : 0) : "memory");
}
// Four 8 x 8 matrices of halves from shared memory: lane i names row i % 8 of matrix i / 8 (PTX: ldmatrix).
__device__ __forceinline__ void gq_matrices(unsigned* d, const void* row) {
  unsigned address = (unsigned)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void gq_matrices_turned(unsigned* d, const void* row) {
  unsigned address = (unsigned)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(address) : "memory");
}
// threadIdx.x, read here and not before.
__device__ __forceinline__ int gq_thread() {
  int v;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(v) :: "memory");
  return v;
}
__device__ __forceinline__ void gq_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void gq_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }
__device__ __forceinline__ void gq_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// A load that stays where it is written: those of the activations go out before the flood of weights.
__device__ __forceinline__ uint4 gq_read16(const void* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
#endif
"""

LAUNCH = """
#ifndef GQ_LAUNCH
#define GQ_LAUNCH
__device__ __forceinline__ void gq_let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void gq_wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#endif
"""
"""Of a programmatic dependent launch (see `launch`); sm_90."""

CLUSTER = """
#ifndef GQ_CLUSTER
#define GQ_CLUSTER
// All threads of a cluster; what was written to shared memory before is visible to the others after.
__device__ __forceinline__ void gq_cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// What another block of the cluster has where this one has p.
__device__ __forceinline__ float gq_remote(const float* p, int rank) {
  unsigned address = (unsigned)__cvta_generic_to_shared(p);
  float v;
  asm volatile("{\\n.reg .u32 a;\\nmapa.shared::cluster.u32 a, %1, %2;\\nld.shared::cluster.f32 %0, [a];\\n}"
               : "=f"(v) : "r"(address), "r"(rank) : "memory");
  return v;
}
__device__ __forceinline__ float4 gq_remote4(const float* p, int rank) {
  unsigned address = (unsigned)__cvta_generic_to_shared(p);
  float4 v;
  asm volatile("{\\n.reg .u32 a;\\nmapa.shared::cluster.u32 a, %4, %5;\\n"
               "ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [a];\\n}"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address), "r"(rank) : "memory");
  return v;
}
#endif
"""
"""From sm_90: blocks of a cluster wait for each other and read each other's shared memory."""

BARRIERS = """
#ifndef GQ_BARRIERS
#define GQ_BARRIERS
__device__ __forceinline__ unsigned gq_shared(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void gq_bar_init(unsigned long long* bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(gq_shared(bar)), "r"(count) : "memory");
}
__device__ __forceinline__ void gq_bar_arrive(unsigned long long* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(gq_shared(bar)) : "memory");
}
__device__ __forceinline__ void gq_bar_wait(unsigned long long* bar, unsigned parity) {
  unsigned done;
  do {
    asm volatile("{\\n.reg .pred p;\\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\\nselp.u32 %0, 1, 0, p;\\n}"
                 : "=r"(done) : "r"(gq_shared(bar)), "r"(parity) : "memory");
  } while (!done);
}
#endif
"""
"""Barriers in shared memory, which can be passed later than they are reached; sm_90."""

SENDING = """
#ifndef GQ_SENDING
#define GQ_SENDING
// A barrier of the cluster in two halves: what has to be there is that the others have come so far, not what they wrote
// (which would be waited for, copies under way with it), except for barriers that gq_publish_barriers is called for.
__device__ __forceinline__ void gq_cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void gq_cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void gq_publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives, and says how many bytes have to be sent before the barrier is passed.
__device__ __forceinline__ void gq_bar_expect(unsigned long long* bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(gq_shared(bar)), "r"(bytes) : "memory");
}
// Four floats to where another block of the cluster has what is p here, counted by its barrier.
__device__ __forceinline__ void gq_send4(float* p, unsigned long long* bar, int rank, const float* v) {
  asm volatile("{\\n.reg .u32 a, b;\\nmapa.shared::cluster.u32 a, %0, %2;\\nmapa.shared::cluster.u32 b, %1, %2;\\n"
               "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [a], {%3,%4,%5,%6}, [b];\\n}"
               :: "r"(gq_shared(p)), "r"(gq_shared(bar)), "r"(rank), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
               : "memory");
}
// As gq_bar_wait, for what other blocks of the cluster have sent.
__device__ __forceinline__ void gq_bar_wait_cluster(unsigned long long* bar, unsigned parity) {
  unsigned done;
  do {
    asm volatile("{\\n.reg .pred p;\\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\\n"
                 "selp.u32 %0, 1, 0, p;\\n}" : "=r"(done) : "r"(gq_shared(bar)), "r"(parity) : "memory");
  } while (!done);
}
#endif
"""
"""From sm_90, after CLUSTER and BARRIERS: stores that a barrier of the block they go to counts."""

COMMON = """
#ifndef GQ_TILES
#define GQ_TILES
__device__ __forceinline__ float2 gq_floats(unsigned pair) {
  half2 h = *reinterpret_cast<half2*>(&pair);
  return make_float2(__half2float(h.x), __half2float(h.y));
}
__device__ __forceinline__ float gq_float(unsigned bits) { return *reinterpret_cast<float*>(&bits); }
__device__ __forceinline__ unsigned gq_bits(float v) { return *reinterpret_cast<unsigned*>(&v); }
__device__ __forceinline__ unsigned gq_pair(float low, float high) {
  half2 h;
  h.x = (half)low;
  h.y = (half)high;
  return *reinterpret_cast<unsigned*>(&h);
}
__device__ __forceinline__ unsigned gq_minus(unsigned v, unsigned z) {
  half2 r = __hsub2(*reinterpret_cast<half2*>(&v), *reinterpret_cast<half2*>(&z));
  return *reinterpret_cast<unsigned*>(&r);
}
__device__ __forceinline__ unsigned gq_scaled_minus(unsigned v, unsigned m, unsigned z) {
  half2 r = __hfma2(*reinterpret_cast<half2*>(&v), *reinterpret_cast<half2*>(&m), *reinterpret_cast<half2*>(&z));
  return *reinterpret_cast<unsigned*>(&r);
}
// The words of a lane in a tile of `bits` words a lane, from shared memory or through L2.
template <int bits, bool shared>
__device__ __forceinline__ void gq_words(unsigned* w, const unsigned* tile, int lane) {
  constexpr int width = bits == 2 ? 2 : bits == 3 ? 1 : 4;
#pragma unroll
  for (int i = 0; i < bits; i += width) {
    const unsigned* p = tile + i * 32 + lane * width;
    if constexpr (width == 4) {
      uint4 v = shared ? *reinterpret_cast<const uint4*>(p) : __ldg(reinterpret_cast<const uint4*>(p));
      w[i] = v.x; w[i + 1] = v.y; w[i + 2] = v.z; w[i + 3] = v.w;
    } else if constexpr (width == 2) {
      uint2 v = shared ? *reinterpret_cast<const uint2*>(p) : __ldg(reinterpret_cast<const uint2*>(p));
      w[i] = v.x; w[i + 1] = v.y;
    } else {
      w[i] = shared ? *p : __ldg(p);
    }
  }
}
#endif
"""


def sets(bits: int) -> int:
    """Returns how many accumulators `fragments` needs: odd steps of 2-bit codes stand four bits higher."""
    return 2 if bits == 2 else 1


def exponent(bits: int, high: int) -> int:
    """Returns t of rows g (high 0) or g + 8 (high 1): `fragments` yields code * 2**(t - 24) in accumulator 0."""
    return {2: 2, 3: 3, 4: 4, 8: 0}[bits] * high + (2 if bits == 3 else 0)


SECOND_SET = 4
"""Accumulator 1 holds code * 2**(t + SECOND_SET - 24)."""


def _shifted(word: int, right: int) -> str:
    """Returns the expression of a word shifted right, or left where `right` is negative."""
    return f"(w[{word}] >> {right})" if right > 0 else f"(w[{word}] << {-right})" if right else f"w[{word}]"


def _masked(bits: int, step: int, high: int, pair: int, bit: int, more: int = 0) -> str:
    """Returns the expression that leaves a pair of codes standing from bit `bit` of the half-words, OR-ed to `more`."""
    parts = lane_fields(bits)[((step * 2 + high) * 2 + pair) * 2]
    terms = []
    for part in parts:
        right = part.shift - part.low - bit
        mask = (((1 << part.width) - 1) << (part.low + bit)) * 0x10001
        word = _shifted(part.word, right)
        terms.append((word, f"0x{mask:08x}u"))
    if not more:
        return " | ".join(f"({word} & {bits_of})" for word, bits_of in terms)
    whole = f"0x{more:08x}u"
    for word, bits_of in terms:
        whole = f"gq_and_or({word}, {bits_of}, {whole})"
    return whole


def fragments(bits: int) -> str:
    """Returns ``gq_fragments{bits}(unsigned a[4][4], const unsigned* w)``: subnormal fragments of four steps."""
    lines = []
    for step in range(STEPS):
        for high in (0, 1):
            for pair in (0, 1):
                bit = exponent(bits, high) + (SECOND_SET if sets(bits) == 2 and step % 2 else 0)
                lines.append(f"a[{step}][{high + 2 * pair}] = {_masked(bits, step, high, pair, bit)};")
    body = "\n  ".join(lines)
    return f"""
#ifndef GQ_FRAGMENTS{bits}
#define GQ_FRAGMENTS{bits}
__device__ __forceinline__ void gq_fragments{bits}(unsigned (*a)[4], const unsigned* w) {{
  {body}
}}
#endif
"""


def bytes_of(bits: int) -> str:
    """Returns ``gq_bytes{bits}(unsigned a[2][4], const unsigned* w)``: fragments of unsigned bytes for mma.m16n8k32.

    a[j] holds steps 2j (registers 0 and 1: rows g and g + 8) and 2j + 1 (registers 2 and 3), four codes a register in
    the order (first pair, second pair) of even k, then of odd k; each is code * 2**`exponent`.
    """
    lines = []
    for step in range(STEPS):
        for high in (0, 1):
            bit = exponent(bits, high)
            terms = []
            for part in lane_fields(bits)[(step * 2 + high) * 4]:
                mask = (((1 << part.width) - 1) << (part.low + bit)) * 0x1010101
                word = _shifted(part.word, part.shift - part.low - bit)
                terms.append(f"({word} & 0x{mask:08x}u)" if bits < 8 else word)
            lines.append(f"a[{step // 2}][{step % 2 * 2 + high}] = {' | '.join(terms)};")
    body = "\n  ".join(lines)
    return f"""
#ifndef GQ_BYTES{bits}
#define GQ_BYTES{bits}
__device__ __forceinline__ void gq_bytes{bits}(unsigned (*a)[4], const unsigned* w) {{
  {body}
}}
#endif
"""


def integers(bits: int) -> str:
    """Returns ``gq_integers{bits}(unsigned a[4][4], const unsigned* w, unsigned low, unsigned high)``.

    The fragments are the halves code - zero with the zero points `low` of row g and `high` of row g + 8. A code OR-ed
    into 1024 is 1024 + code * 2**t; times 2**-t, minus 1024 * 2**-t + zero, it is exact.
    """
    lines = []
    for high, name in ((0, "low"), (1, "high")):
        bit = exponent(bits, high)
        lines.append(f"unsigned z{high} = (0x{0x6400 - (bit << 10):04x}u + ({name} << {bit})) * 0x10001u;")
        if bit:
            lines.append(f"z{high} ^= 0x80008000u;")
    for step in range(STEPS):
        for high in (0, 1):
            bit = exponent(bits, high)
            for pair in (0, 1):
                value = _masked(bits, step, high, pair, bit, 0x64006400)
                half = f"0x{((15 - bit) << 10) * 0x10001:08x}u"
                call = f"gq_scaled_minus({value}, {half}, z{high})" if bit else f"gq_minus({value}, z{high})"
                lines.append(f"a[{step}][{high + 2 * pair}] = {call};")
    body = "\n  ".join(lines)
    return f"""
#ifndef GQ_INTEGERS{bits}
#define GQ_INTEGERS{bits}
__device__ __forceinline__ void gq_integers{bits}(unsigned (*a)[4], const unsigned* w, unsigned low, unsigned high) {{
  {body}
}}
#endif
"""


def code_lookup(bits: int, natural: bool = False) -> str:
    """Returns ``gq_code{bits}(tile, row, k)``: one code of a tile in either order of k, for the plain kernel."""
    if bits == 3:
        body = """int byte = 8 * pair + 16 * odd;
  if (step < 3) return at(step) >> (2 + 3 * high + byte) & 7;
  return (at(high) >> byte & 3) | (at(2) >> (high + byte) & 1) << 2;"""
    else:
        word, bit = {
            2: ("step / 2", "4 * (step % 2) + 2 * high + 8 * pair"),
            4: ("step", "4 * high + 8 * pair"),
            8: ("2 * step + high", "8 * pair"),
        }[bits]
        body = f"return at({word}) >> ({bit} + 16 * odd) & {(1 << bits) - 1};"
    return f"""
__device__ __forceinline__ int gq_code{bits}(const void* tile, int row, int k) {{
  constexpr int width = {2 if bits == 2 else 1 if bits == 3 else 4};
  int high = row / 8, lane = row % 8 * 4 + {"k % 8 / 2" if natural else "k % 32 / 8"};
  int step = {"k / 16, pair = k % 16 / 8" if natural else "k / 32 * 2 + k % 8 / 4, pair = k % 4 / 2"}, odd = k % 2;
  auto at = [&](int word) {{
    return __ldg(static_cast<const unsigned*>(tile) + word / width * 32 * width + lane * width + word % width);
  }};
  {body}
}}
"""
