#pragma once
// Asynchronous copies of the GPU: cp.async (sm_80).

#include "harness/device/copy_async.h"

namespace tp {

template <int Bytes>
__device__ inline void copy_async(void* shared, const void* global, Where) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  const auto to = unsigned(__cvta_generic_to_shared(shared));
  if constexpr (Bytes == 16) {  // .cg: not through L1, where only 16 bytes can go by
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(Bytes)
                 : "memory");
  }
}
template <int Bytes>
__device__ inline void copy_async_or_zero(void* shared, const void* global, bool wanted, Where) {
  static_assert(Bytes == 16);
  const auto to = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
               "r"(wanted ? 16 : 0)
               : "memory");
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

}  // namespace tp
