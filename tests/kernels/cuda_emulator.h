// SPDX-License-Identifier: Apache-2.0
// Just enough CUDA for a CPU to run one generated kernel: every thread is a fiber; a fiber that reaches a barrier, a
// shuffle or an mma waits until its block or warp has arrived. Fibers take turns in a shuffled order. Registers and
// shared memory start as NaN, and every access to them is checked against the *declared* extent: what nvcc makes of an
// access beyond it is undefined even where this CPU has padding. `emu_failure` says what was wrong first.
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

struct Dim { unsigned x, y, z; };
static Dim threadIdx, blockIdx, gridDim;
static int emu_threads, emu_cluster = 1;  // of a block; blocks of a cluster, whose threads are fibers of one run
// Fibers are begun by setcontext and go on by longjmp: swapcontext makes a system call each time.
struct emu_fiber { jmp_buf here; bool begun, done; };
static std::vector<emu_fiber> emu_fibers;
static jmp_buf emu_main;
static int emu_current;
static int emu_rank() { return emu_current / emu_threads; }
static long emu_arrived_block[8], emu_generation_block[8], emu_arrived_cluster, emu_generation_cluster;
static long emu_arrived_warp[128], emu_generation_warp[128];

static void emu_yield() { if (!_setjmp(emu_fibers[emu_current].here)) _longjmp(emu_main, 1); }
static void emu_wait(long& arrived, long& generation, int expected) {
  long mine = generation;
  if (++arrived == expected) { arrived = 0; ++generation; return; }
  while (generation == mine) emu_yield();
}
static void __syncthreads() {
  emu_wait(emu_arrived_block[emu_rank()], emu_generation_block[emu_rank()], emu_threads);
}
static void emu_warp_wait() {
  int warp = emu_current / 32;
  emu_wait(emu_arrived_warp[warp], emu_generation_warp[warp], 32);
}

static const char* emu_failure;
static void emu_fail(const char* what) {
  if (!emu_failure) emu_failure = what;
}
template <typename T> static T emu_poison() {
  T value;
  memset((void*)&value, 0xff, sizeof(T));
  return value;
}

// A pointer into a register or shared array that knows the array's end.
template <typename T> struct emu_span {
  T *at, *begin, *end;
  bool inside(int64_t i) const {
    bool ok = at + i >= begin && at + i < end;
    if (!ok) emu_fail("a register or shared array is accessed beyond its declared extent");
    return ok;
  }
  operator emu_span<const T>() const { return {at, begin, end}; }
  struct Element {
    const emu_span span;
    operator T() const { return span.inside(0) ? *span.at : emu_poison<std::remove_const_t<T>>(); }
    Element& operator=(T value) {
      if (span.inside(0)) *const_cast<std::remove_const_t<T>*>(span.at) = value;
      return *this;
    }
    Element& operator=(const Element& other) { return *this = T(other); }
    Element& operator+=(T value) { return *this = T(*this) + value; }
    emu_span operator&() const { return span; }
  };
  emu_span operator+(int64_t i) const { return {at + i, begin, end}; }
  Element operator[](int64_t i) const { return {*this + i}; }
};
template <typename T, int N> struct emu_array {
  alignas(16) T values[N];
  emu_array() { memset((void*)values, 0xff, sizeof values); }
  emu_span<T> operator+(int64_t i) { return {values + i, values, values + N}; }
  typename emu_span<T>::Element operator[](int64_t i) { return {*this + i}; }
};
static std::vector<std::pair<void*, size_t>> emu_shared_arrays;
template <typename T, int N> struct emu_shared : emu_array<T, N> {
  emu_shared() { emu_shared_arrays.push_back({this->values, sizeof this->values}); }
};

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define uint unsigned int
#define uchar unsigned char

typedef _Float16 half;
struct half2 { half x, y; };
struct __attribute__((aligned(8))) uint2 { unsigned x, y; };
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
struct float2 { float x, y; };
static float2 make_float2(float x, float y) { return {x, y}; }
static float __half2float(half v) { return v; }
#define __expf(x) expf(x)
static float rsqrtf(float x) { return 1.0f / sqrtf(x); }
struct __attribute__((aligned(16))) uint4 { unsigned x, y, z, w; };
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static std::vector<std::pair<const char*, size_t>> emu_tensors;
template <typename T> static T emu_read(const T* p) {
  auto* first = reinterpret_cast<const char*>(p);
  for (auto [base, size] : emu_tensors) {
    if (first < base || first + sizeof(T) > base + size) continue;
    // A GPU faults on misaligned wide loads. Device tensors start on 256 bytes, numpy's do not.
    if ((first - base) % sizeof(T)) emu_fail("a wide load is misaligned");
    T value;
    memcpy((void*)&value, first, sizeof(T));
    return value;
  }
  emu_fail("a load is outside every tensor");
  return emu_poison<T>();
}
template <typename T> static T __ldg(const T* p) { return emu_read(p); }
template <typename T> static T __ldcs(const T* p) { return emu_read(p); }
static half2 __half2half2(half v) { return {v, v}; }
static half2 __hmul2(half2 a, half2 b) { return {half(float(a.x) * float(b.x)), half(float(a.y) * float(b.y))}; }
static half2 __hsub2(half2 a, half2 b) { return {half(float(a.x) - float(b.x)), half(float(a.y) - float(b.y))}; }
static half2 __hfma2(half2 a, half2 b, half2 c) {
  return {half(double(a.x) * double(b.x) + double(c.x)), half(double(a.y) * double(b.y) + double(c.y))};
}
template <typename A, typename B> static auto min(A a, B b) -> decltype(a + b) { return a < b ? a : b; }
template <typename A, typename B> static auto max(A a, B b) -> decltype(a + b) { return a > b ? a : b; }

template <typename T> static T __shfl_sync(unsigned, T v, int from) {
  int warp = emu_current / 32;
  static T values[128][32];
  values[warp][emu_current % 32] = v;
  emu_warp_wait();
  T other = values[warp][from];
  emu_warp_wait();
  return other;
}
template <typename T> static T __shfl_xor_sync(unsigned mask, T v, int other) {
  return __shfl_sync(mask, v, emu_current % 32 ^ other);
}
static unsigned __byte_perm(unsigned low, unsigned high, unsigned select) {
  const uint64_t bytes = low | uint64_t(high) << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> (select >> 4 * i & 7) * 8 & 255) << 8 * i;
  return result;
}

// mma.sync.m16n8k16, fragments as in the PTX manual.
static half emu_a[128][16][16], emu_b[128][16][8];
static void emu_put(half* low, half* high, unsigned pair) {
  uint16_t bits[2] = {uint16_t(pair), uint16_t(pair >> 16)};
  memcpy(low, &bits[0], 2);
  memcpy(high, &bits[1], 2);
}
static void emu_mma(emu_span<float> d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  int warp = emu_current / 32, lane = emu_current % 32, g = lane / 4, c = lane % 4;
  auto& a = emu_a[warp];
  auto& b = emu_b[warp];
  emu_put(&a[g][2 * c], &a[g][2 * c + 1], a0);
  emu_put(&a[g + 8][2 * c], &a[g + 8][2 * c + 1], a1);
  emu_put(&a[g][2 * c + 8], &a[g][2 * c + 9], a2);
  emu_put(&a[g + 8][2 * c + 8], &a[g + 8][2 * c + 9], a3);
  emu_put(&b[2 * c][g], &b[2 * c + 1][g], b0);
  emu_put(&b[2 * c + 8][g], &b[2 * c + 9][g], b1);
  emu_warp_wait();
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k) d[i] += float(a[g + 8 * (i / 2)][k]) * float(b[k][2 * c + i % 2]);
  emu_warp_wait();
}

// The same of bfloat16: the upper halves of floats.
struct nv_bfloat16 {
  uint16_t bits;
  nv_bfloat16() = default;
  explicit nv_bfloat16(float v) {
    uint32_t word;
    memcpy(&word, &v, 4);
    bits = (word + 0x7fff + (word >> 16 & 1)) >> 16;  // to the nearest, ties to even
  }
  operator float() const {
    const uint32_t word = uint32_t(bits) << 16;
    float v;
    memcpy(&v, &word, 4);
    return v;
  }
};
static nv_bfloat16 emu_bf16_a[128][16][16], emu_bf16_b[128][16][8];
static void gq_mma4_bf16(float* d, const unsigned* a, unsigned b0, unsigned b1) {
  int warp = emu_current / 32, lane = emu_current % 32, g = lane / 4, c = lane % 4;
  for (int i = 0; i < 4; ++i) memcpy(&emu_bf16_a[warp][g + i % 2 * 8][2 * c + i / 2 * 8], &a[i], 4);
  for (int i = 0; i < 4; ++i) {
    const uint16_t bits = (i < 2 ? b0 : b1) >> i % 2 * 16;
    memcpy(&emu_bf16_b[warp][2 * c + i % 2 + i / 2 * 8][g], &bits, 2);
  }
  emu_warp_wait();
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k)
      d[i] += float(emu_bf16_a[warp][g + 8 * (i / 2)][k]) * float(emu_bf16_b[warp][k][2 * c + i % 2]);
  emu_warp_wait();
}

// mma.sync.m16n8k32 of unsigned and signed bytes.
static uint8_t emu_bytes_a[128][16][32];
static int8_t emu_bytes_b[128][32][8];
static void gq_mma_bytes(unsigned* d, const unsigned* a, unsigned b0, unsigned b1, const unsigned* c0) {
  int warp = emu_current / 32, lane = emu_current % 32, g = lane / 4, c = lane % 4;
  unsigned begin[4];
  memcpy(begin, c0, 16);
  for (int i = 0; i < 4; ++i)
    for (int e = 0; e < 4; ++e) emu_bytes_a[warp][g + i % 2 * 8][i / 2 * 16 + 4 * c + e] = uint8_t(a[i] >> 8 * e);
  for (int e = 0; e < 4; ++e) {
    emu_bytes_b[warp][4 * c + e][g] = int8_t(b0 >> 8 * e);
    emu_bytes_b[warp][16 + 4 * c + e][g] = int8_t(b1 >> 8 * e);
  }
  emu_warp_wait();
  for (int i = 0; i < 4; ++i) {
    d[i] = begin[i];
    for (int k = 0; k < 32; ++k) d[i] += emu_bytes_a[warp][g + 8 * (i / 2)][k] * emu_bytes_b[warp][k][2 * c + i % 2];
  }
  emu_warp_wait();
}
static float gq_largest(float a, float b) {
  if (a != a || b != b) return NAN;
  return fmaxf(fabsf(a), fabsf(b));
}

// What tile_source.PTX says in assembly. Asynchronous copies: the target is poisoned at once and written at the wait.
#define GQ_PTX
struct emu_copy { void* to; uint4 value; };
static std::vector<std::vector<emu_copy>> emu_copies[4096];  // per thread, one list per group; the last is open
static void emu_wait_copies(int pending) {
  auto& groups = emu_copies[emu_current];
  while (int(groups.size()) > pending + 1) {
    for (auto& copy : groups.front()) memcpy(copy.to, &copy.value, 16);
    groups.erase(groups.begin());
  }
}
static void gq_copy16_or_zero(void* to, const void* from, bool wanted) {
  if (uintptr_t(to) % 16) emu_fail("an asynchronous copy is misaligned in shared memory");
  auto& groups = emu_copies[emu_current];
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back({to, wanted ? emu_read(reinterpret_cast<const uint4*>(from)) : uint4{}});
  memset(to, 0xff, 16);
}
static void gq_copy16(void* to, const void* from) { gq_copy16_or_zero(to, from, true); }
static unsigned gq_and_or(unsigned v, unsigned mask, unsigned more) { return (v & mask) | more; }
static void gq_commit() {
  auto& groups = emu_copies[emu_current];
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}
template <int pending> static void gq_wait() { emu_wait_copies(pending); }
static void __syncwarp() { emu_warp_wait(); }
static long emu_arrived_named[8][16], emu_generation_named[8][16];
static void gq_barrier(int id, int threads) {
  emu_wait(emu_arrived_named[emu_rank()][id], emu_generation_named[emu_rank()][id], threads);
}
// Blocks of a cluster: dynamic shared memory is one array, a stretch of it for each of them.
static int64_t emu_dynamic_bytes;
static void gq_cluster_barrier() { emu_wait(emu_arrived_cluster, emu_generation_cluster, emu_threads * emu_cluster); }
static float gq_remote(const float* p, int rank) {
  if (rank < 0 || rank >= emu_cluster) emu_fail("another block's shared memory is read beyond the cluster");
  return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(p) + (rank - emu_rank()) * emu_dynamic_bytes);
}
static long emu_cluster_turn[4096];  // of each thread: the generation of the cluster's barrier that it arrived at
static void gq_cluster_arrive() {
  emu_cluster_turn[emu_current] = emu_generation_cluster;
  if (++emu_arrived_cluster == emu_threads * emu_cluster) { emu_arrived_cluster = 0; ++emu_generation_cluster; }
}
static void gq_cluster_wait() {
  while (emu_generation_cluster == emu_cluster_turn[emu_current]) emu_yield();
}
static int gq_thread() { return threadIdx.x; }
static void gq_let_next_start() {}
static void gq_wait_for_previous() {}
static uint4 gq_read16(const void* p) { return emu_read(reinterpret_cast<const uint4*>(p)); }
static void gq_mma4(float* d, const unsigned* a, unsigned b0, unsigned b1) {
  emu_mma({d, d, d + 4}, a[0], a[1], a[2], a[3], b0, b1);
}

// ldmatrix: register j of lane (g, c) holds the halves 2c and 2c + 1 of row g of matrix j, or of its column g.
static const char* emu_rows[128][32];
static void emu_matrices(unsigned* d, const void* row, bool turned) {
  int warp = emu_current / 32, lane = emu_current % 32, g = lane / 4, c = lane % 4;
  if (uintptr_t(row) % 16) emu_fail("a row of a matrix is misaligned in shared memory");
  emu_rows[warp][lane] = reinterpret_cast<const char*>(row);
  emu_warp_wait();
  for (int j = 0; j < 4; ++j) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const char* at = emu_rows[warp][j * 8 + (turned ? 2 * c + e : g)];
      memcpy(&pair[e], at + 2 * (turned ? g : 2 * c + e), 2);
    }
    d[j] = pair[0] | unsigned(pair[1]) << 16;
  }
  emu_warp_wait();
}
static void gq_matrices(unsigned* d, const void* row) { emu_matrices(d, row, false); }
static void gq_matrices_turned(unsigned* d, const void* row) { emu_matrices(d, row, true); }

// What wgmma_source.HOPPER says in assembly. Products are made at once.
#define GQ_HOPPER
struct __attribute__((aligned(16))) float4 { float x, y, z, w; };
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static float __fdividef(float a, float b) { return a / b; }
struct emu_bar { uint16_t expected, pending; uint32_t phase; };
static uint64_t gq_shared(const void* p) { return uintptr_t(p); }
// Of an address only the low bits are in it, as on the GPU; the rest is that of the array that the descriptor was for.
static uintptr_t emu_described;
static unsigned gq_descriptor(const void* p) {
  emu_described = uintptr_t(p) >> 36 << 36;
  return uintptr_t(p) / 16;
}
static emu_bar& emu_at(unsigned long long* bar) { return *reinterpret_cast<emu_bar*>(bar); }
static void gq_bar_init(unsigned long long* bar, int count) { emu_at(bar) = {uint16_t(count), uint16_t(count), 0}; }
static std::map<void*, int64_t> emu_awaited;  // that a barrier still waits for
static void emu_pass(unsigned long long* bar) {
  emu_bar& b = emu_at(bar);
  if (b.pending == 0 && emu_awaited[bar] == 0) { b.pending = b.expected; ++b.phase; }
}
static void gq_bar_arrive(unsigned long long* bar) {
  emu_bar& b = emu_at(bar);
  if (b.pending == 0 || b.pending > b.expected) return emu_fail("an mbarrier is used before it is made");
  --b.pending;
  emu_pass(bar);
}
static void gq_publish_barriers() {}
static void gq_bar_expect(unsigned long long* bar, int bytes) {
  emu_awaited[bar] += bytes;
  gq_bar_arrive(bar);
}
static void gq_send4(float* p, unsigned long long* bar, int rank, const float* v) {
  if (rank < 0 || rank >= emu_cluster) return emu_fail("another block's shared memory is written beyond the cluster");
  if (uintptr_t(p) % 16) return emu_fail("sixteen bytes are sent to a misaligned place");
  const int64_t there = (rank - emu_rank()) * emu_dynamic_bytes;
  memcpy(reinterpret_cast<char*>(p) + there, v, 16);
  auto* counter = reinterpret_cast<unsigned long long*>(reinterpret_cast<char*>(bar) + there);
  if ((emu_awaited[counter] -= 16) < 0) emu_fail("more is sent than a barrier expects");
  emu_pass(counter);
}
static void gq_bar_wait(unsigned long long* bar, unsigned parity) {
  for (int i = 0; emu_at(bar).phase % 2 == parity && !emu_failure; ++i) {
    if (i > 100000) emu_fail("an mbarrier is waited for in vain");
    emu_yield();
  }
}
static void gq_bar_wait_cluster(unsigned long long* bar, unsigned parity) { gq_bar_wait(bar, parity); }
static void gq_publish() {}
static void gq_wgmma_fence() {}
static void gq_wgmma_commit() {}
template <int> static void gq_wgmma_wait() {}
template <int> static void gq_more_registers() {}
template <int> static void gq_fewer_registers() {}
static float4 gq_remote4(const float* p, int rank) {
  return {gq_remote(p, rank), gq_remote(p + 1, rank), gq_remote(p + 2, rank), gq_remote(p + 3, rank)};
}
template <int n> static void gq_wgmma(float* d, const unsigned* a, unsigned b) {
  int warp = emu_current / 32, lane = emu_current % 32, g = lane / 4, c = lane % 4;
  auto& rows = emu_a[warp];
  for (int i = 0; i < 4; ++i) {
    half* to = &rows[g + i % 2 * 8][2 * c + i / 2 * 8];
    emu_put(to, to + 1, a[i]);
  }
  emu_warp_wait();
  for (int i = 0; i < n / 2; ++i) {
    const int column = i / 4 * 8 + 2 * c + i % 2, row = g + i % 4 / 2 * 8;
    for (int k = 0; k < 16; ++k) {
      uintptr_t at = emu_described + b * 16ull + column / 8 * 1024 + column % 8 * 128 + k * 2;
      at ^= (at >> 7 & 7) << 4;
      d[i] += float(rows[row][k]) * float(*reinterpret_cast<const half*>(at));
    }
  }
  emu_warp_wait();
}

static void (*emu_body)();
static void emu_entry() {
  emu_body();
  for (auto& group : emu_copies[emu_current])
    if (!group.empty()) emu_fail("a thread ends before its copies");
  emu_copies[emu_current].clear();
  emu_fibers[emu_current].done = true;
  _longjmp(emu_main, 1);
}
static void emu_go_on(int fiber, char* stack, size_t size) {
  emu_fiber& it = emu_fibers[fiber];
  emu_current = fiber;
  if (_setjmp(emu_main)) return;
  if (it.begun) _longjmp(it.here, 1);
  it.begun = true;
  ucontext_t begin;
  getcontext(&begin);
  begin.uc_stack.ss_sp = stack, begin.uc_stack.ss_size = size;
  begin.uc_link = nullptr;
  makecontext(&begin, emu_entry, 0);
  setcontext(&begin);
}
static void emu_launch(Dim grid, int threads, void (*body)(), int cluster = 1) {
  const size_t stack = 64 << 10;
  emu_threads = threads;
  emu_cluster = cluster;
  threads *= cluster;
  gridDim = grid;
  emu_body = body;
  std::vector<char> stacks(stack * threads);
  std::vector<int> order(threads);
  for (int t = 0; t < threads; ++t) order[t] = t;
  uint32_t random = threads;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; x += cluster) {
      emu_fibers.assign(threads, emu_fiber());
      for (auto [array, size] : emu_shared_arrays) memset(array, 0xff, size);
      for (int left = threads; left > 0;) {
        for (int t = threads; t > 1; --t) {  // shuffled
          std::swap(order[t - 1], order[uint64_t(random = random * 1664525u + 1013904223u) * t >> 32]);
        }
        for (int t : order) {
          if (emu_fibers[t].done) continue;
          threadIdx = {unsigned(t % emu_threads), 0, 0};
          blockIdx = {x + t / emu_threads, y, 0};
          emu_go_on(t, &stacks[stack * t], stack);
          left -= emu_fibers[t].done;
        }
      }
    }
}
