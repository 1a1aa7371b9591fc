#pragma once
// CUDA's words for kernels that run in the emulator. Only .cu files see this header (through
// device.h).

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "harness/device/emulator/atomics.h"
#include "harness/device/emulator/dim3.h"
#include "harness/device/emulator/launch.h"
#include "harness/device/emulator/thread.h"
#include "harness/device/emulator/warp_functions.h"
#include "harness/device/emulator/where.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __maxnreg__(...)

#define threadIdx (::tp::emulator::running->thread_idx)
#define blockIdx (::tp::emulator::running->block->block_idx)
#define blockDim (::tp::emulator::running->block->block_dim)
#define gridDim (::tp::emulator::running->block->grid_dim)

inline constexpr int warpSize = 32;
using std::max;  // CUDA has both without a namespace
using std::min;

inline void __syncthreads(tp::Where where = tp::Where::here()) {
  tp::emulator::block_barrier(where);
}
inline void __nanosleep(unsigned, tp::Where where = tp::Where::here()) {
  tp::emulator::yield("__nanosleep", where);
}
template <typename T>
T __ldg(const T* address) {
  return *address;
}

namespace tp {

// __syncthreads for helpers that speak for their caller.
inline void block_barrier(Where where) { emulator::block_barrier(where); }

// The block's dynamic shared memory: poisoned for every block, exactly as large as the launch said.
template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(emulator::running->block->shared);
}

// 2^x within 2 ulp, exactly 1 at 0, and 0 where it would be subnormal: one instruction of a GPU.
inline float exp2_flushed(float x) {
  const float result = std::exp2(x);
  return result < 0x1p-126f ? 0.0f : result;
}

inline void check_aligned(const void* address, std::size_t bytes, const char* what, Where where) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) {
    emulator::misaligned(address, bytes, what, where);
  }
}

}  // namespace tp

#include "harness/device/emulator/copy_async.h"
#include "harness/device/emulator/matrix.h"
#include "harness/device/emulator/overlap.h"
#include "harness/device/emulator/peer_words.h"
