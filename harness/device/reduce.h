#pragma once
// Sums and maxima over a block, in one fixed order on every backend. Included by device.h, whose
// dialects have warp_sum and warp_max.

#include <bit>
#include <cstdint>

namespace tp {

constexpr int ceil_log2(int n) { return n <= 1 ? 0 : 1 + ceil_log2((n + 1) / 2); }

// fp32 roundings on the longest path through warp_sum, and through block_sum of `threads` threads.
constexpr int kWarpSumDepth = 5;
constexpr int block_sum_depth(int threads) {
  return kWarpSumDepth + ceil_log2((threads + 31) / 32);
}
// Leaves of the tree over a block's warps: their number filled up to 4, 8, 16 or 32.
constexpr int block_tree_width(int warps) {
  return warps <= 4 ? 4 : warps <= 8 ? 8 : warps <= 16 ? 16 : 32;
}
// Floats of shared memory that block_sum and block_max of `threads` threads need as scratch.
constexpr int block_scratch_floats(int threads) { return block_tree_width((threads + 31) / 32); }

// The binary tree over values[0..Width).
template <int Width>
__device__ inline float tree_sum(const float* values) {
  if constexpr (Width == 1) {
    return *values;
  } else {
    return tree_sum<Width / 2>(values) + tree_sum<Width / 2>(values + Width / 2);
  }
}

// The sum of all threads' values, given to every thread. blockDim must be (32 k, 1, 1). Order: xor
// butterflies inside the warps, then a balanced binary tree over the warps in order, filled up with
// zeros: real ones in memory, since nvcc joins the leaves' loads into wide ones whatever a
// condition says. One barrier inside: `scratch` (block_scratch_floats of shared memory) is free for
// other uses after the *next* __syncthreads.
__device__ inline float block_sum(float value, float* scratch, Where where = Where::here()) {
  const float sum = warp_sum(value, where);
  const int warps = int(blockDim.x / 32), width = block_tree_width(warps),
            thread = int(threadIdx.x);
  if (thread % 32 == 0) scratch[thread / 32] = sum;
  if (thread >= warps && thread < width) scratch[thread] = 0.0f;
  block_barrier(where);
  if (width == 4) return tree_sum<4>(scratch);
  if (width == 8) return tree_sum<8>(scratch);
  if (width == 16) return tree_sum<16>(scratch);
  return tree_sum<32>(scratch);
}

// The same for the maximum, in no order that matters: NaN if any value is, +0 above -0.
__device__ __forceinline__ float block_max(float value, float* scratch,
                                           Where where = Where::here()) {
  float result = warp_max(value, where);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = result;
  block_barrier(where);
  const int warps = int(blockDim.x / 32);
  for (int i = 0; i < warps; ++i) result = larger(result, scratch[i]);
  return result;
}

}  // namespace tp
