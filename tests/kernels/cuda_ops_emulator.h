// SPDX-License-Identifier: Apache-2.0
// What the op kernels (attention, norms, sampling ...) need beyond cuda_emulator.h: shuffles of several types, atomics,
// vector types and the fast-math functions.
#pragma once
#include "cuda_emulator.h"

struct __attribute__((aligned(8))) half4 { half x, y, z, w; };
static half4 make_half4(half x, half y, half z, half w) { return {x, y, z, w}; }
static half2 make_half2(half x, half y) { return {x, y}; }
static half __float2half_rn(float v) { return half(v); }
static unsigned __pack_half2(half a, half b) {
  uint16_t bits[2];
  memcpy(&bits[0], &a, 2);
  memcpy(&bits[1], &b, 2);
  return unsigned(bits[0]) | unsigned(bits[1]) << 16;
}
#define __logf(x) logf(x)
static float rsqrt(float x) { return 1.0f / sqrtf(x); }

static char emu_bytes[32][32][8];
template <typename T> static T emu_shuffle(T v, int source) {
  int warp = emu_current / 32, lane = emu_current % 32;
  memcpy(emu_bytes[warp][lane], &v, sizeof(T));
  emu_warp_wait();
  T other;
  memcpy(&other, emu_bytes[warp][source & 31], sizeof(T));
  emu_warp_wait();
  return other;
}
template <typename T> static T __shfl_xor_sync(unsigned, T v, int mask, int) {
  return emu_shuffle(v, (emu_current % 32) ^ mask);
}
template <typename T> static T __shfl_up_sync(unsigned, T v, int offset, int) {
  int lane = emu_current % 32;
  return emu_shuffle(v, lane >= offset ? lane - offset : lane);
}
template <typename T> static T __shfl_sync(unsigned, T v, int lane, int) { return emu_shuffle(v, lane); }
static int atomicAdd(int* at, int value) {
  int before = *at;
  *at += value;
  return before;
}
