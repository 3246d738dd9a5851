# SPDX-License-Identifier: Apache-2.0
"""CUDA text around Hopper's own instructions (sm_90a): wgmma with A in registers, mbarriers, clusters.

Shared memory that wgmma reads is described by a 64-bit word ("matrix descriptor" of the PTX manual): address / 16, the
distance of groups of eight rows (1,024 bytes) and the 128-byte swizzle, in which the sixteen-byte piece j of row r is
stored at piece j ^ (r % 8). Everything that the emulator of the tests has to replace stands between the guards.
"""

from __future__ import annotations

TOKENS = (8, 16, 32, 64, 128, 256)
"""The widths of wgmma, in columns of B, that `hopper` writes out."""

_HELPERS = """
// The low half of a descriptor; the high half says swizzle and distance, and is the same for all.
__device__ __forceinline__ unsigned gq_descriptor(const void* p) { return 1u << 16 | (gq_shared(p) & 0x3ffff) >> 4; }
// What this thread wrote to shared memory becomes visible to wgmma.
__device__ __forceinline__ void gq_publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void gq_wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void gq_wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending> __device__ __forceinline__ void gq_wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
template <int count> __device__ __forceinline__ void gq_more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count> __device__ __forceinline__ void gq_fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int n> __device__ __forceinline__ void gq_wgmma(float* d, const unsigned* a, unsigned b);
"""


def _wgmma(tokens: int) -> str:
    """Returns ``gq_wgmma<tokens>``: d [64, tokens] += a [64, 16] from registers times b from shared memory."""
    count = tokens // 2
    outputs = ",".join(f"%{i}" for i in range(count))
    inputs = ",".join(f"%{count + i}" for i in range(4))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""
template <> __device__ __forceinline__ void gq_wgmma<{tokens}>(float* d, const unsigned* a, unsigned b) {{
  asm volatile("{{\\n.reg .pred p;\\n.reg .b64 b;\\nsetp.ne.b32 p, %{count + 5}, 0;\\n"
      "mov.b64 b, {{%{count + 4}, %{count + 6}}};\\n"
      "wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.f16.f16 {{{outputs}}}, {{{inputs}}}, b, p, 1, 1, 0;\\n}}"
      : {operands}
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(1), "r"(1 << 30 | 64));
}}"""


HOPPER = f"""
#ifndef GQ_HOPPER
#define GQ_HOPPER
{_HELPERS}{"".join(_wgmma(tokens) for tokens in TOKENS)}
#endif
"""
