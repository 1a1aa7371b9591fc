#pragma once
// The dialect's own words on the GPU. Only .cu files see this header (through device.h).

#ifndef __CUDACC__
#error "device.h is for .cu files"
#endif

#include <cstddef>
#include <type_traits>

#include "harness/device/cuda/launch.h"
#include "harness/device/larger.h"

namespace tp {

// Where a kernel called something: only the emulator tells.
struct Where {
  __host__ __device__ static constexpr Where here() { return {}; }
};

__device__ inline void block_barrier(Where) { __syncthreads(); }

template <typename T>
__device__ inline T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char tp_dynamic_shared[];
  return reinterpret_cast<T*>(tp_dynamic_shared);
}

__device__ inline float warp_sum(float value, Where = {}) {
  for (int distance = 16; distance >= 1; distance /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  }
  return value;
}
template <int Lanes>
__device__ inline float part_sum(float value, Where = {}) {
  for (int distance = Lanes / 2; distance >= 1; distance /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  }
  return value;
}
__device__ inline float warp_max(float value, Where = {}) {
  for (int distance = 16; distance >= 1; distance /= 2) {
    value = larger(value, __shfl_xor_sync(0xFFFFFFFFu, value, distance));
  }
  return value;
}

__device__ inline float exp2_flushed(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The hardware traps on its own.
__device__ inline void check_aligned(const void*, std::size_t, const char*, Where) {}

template <typename T>
__device__ inline T load_volatile(const T* address) {
  return *static_cast<const volatile T*>(address);
}
template <typename T>
__device__ inline void store_volatile(T* address, std::type_identity_t<T> value) {
  *static_cast<volatile T*>(address) = value;
}
template <typename T>
__device__ inline T load_acquire(const T* address) {
  const T value = load_volatile(address);
  __threadfence_system();
  return value;
}
template <typename T>
__device__ inline void store_release(T* address, std::type_identity_t<T> value) {
  __threadfence_system();
  store_volatile(address, value);
}
template <typename T>
__device__ inline T peer_load(const T* address) {
  return *address;
}
template <typename T>
__device__ inline void peer_store(T* address, std::type_identity_t<T> value) {
  *address = value;
}

}  // namespace tp

#include "harness/device/cuda/copy_async.h"
#include "harness/device/cuda/matrix.h"
#include "harness/device/cuda/overlap.h"
#include "harness/device/cuda/peer_words.h"
