#pragma once
// What kernels of rows share: how many threads take a row; and of norms, the sum of its squares.

#include <cstdint>

#include "harness/device/device.h"

namespace tp {

// Threads of the block that takes a row of `cols` elements: whole warps, about eight elements a
// thread.
constexpr int row_threads(std::int64_t cols) {
  const std::int64_t warps = (cols + 511) / 512;
  return int(warps < 1 ? 1 : warps > 8 ? 8 : warps) * 32;
}

// Longest chain of fp32 roundings of a block's sum of squares of a row: a thread's own fmaf steps,
// then the sum of the threads'.
constexpr std::int64_t row_sum_depth(std::int64_t cols, int threads) {
  return (cols + threads - 1) / threads + block_sum_depth(threads);
}

// Longest chain of fp32 roundings of warp_sum_of_squares.
constexpr std::int64_t warp_row_sum_depth(std::int64_t cols) {
  return (cols + 31) / 32 + kWarpSumDepth;
}

// Sum of squares of a row, in every lane of the warp that is given it.
template <typename T>
__device__ float warp_sum_of_squares(const T* row, std::int64_t cols) {
  float sum = 0.0f;
  for (std::int64_t j = threadIdx.x % 32; j < cols; j += 32) {
    const float x = to_float(row[j]);
    sum = fmaf(x, x, sum);
  }
  return warp_sum(sum);
}

// Both operations round to nearest, on a GPU as on the host: rsqrtf would not give the same bits.
__device__ inline float inverse_root(float mean_square, float eps) {
  return 1.0f / sqrtf(mean_square + eps);
}

// The weight of a norm: data[j], offset + data[j] (models that store w and mean 1 + w), or none.
template <typename T>
struct NormWeight {
  const T* data = nullptr;
  float offset = 0.0f;

  __device__ float operator[](std::int64_t j) const {
    return data == nullptr ? 1.0f : offset + to_float(data[j]);
  }
};

}  // namespace tp
