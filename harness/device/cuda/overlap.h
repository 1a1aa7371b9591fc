#pragma once
// Overlapping kernels of the GPU: griddepcontrol (sm_90). Older ones run them in order.

#include "harness/device/overlap.h"

namespace tp {

__device__ inline void wait_for_previous_kernel(Where) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void let_next_kernel_start(Where) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace tp
