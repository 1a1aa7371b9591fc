#pragma once
// Products of matrices that a library makes, where there is one: cuBLASLt on a GPU, opened when the
// program runs. Without it, and in the emulator, matmul and scaled_matmul make all products.

#include <cstdint>

#include "harness/base/dtype.h"
#include "harness/device/stream.h"

namespace tp {

// out[i][j] = x_scale w_scale sum_k x[i][k] w[j][k], with x [m, k], w [n, k], out [m, n], rounded
// once. Strides in elements.
struct LibraryProduct {
  DType type = DType::bf16;  // of x and w: f16, bf16 or e4m3
  DType out_type = DType::bf16;
  std::int64_t m = 0, n = 0, k = 0;
  const void* x = nullptr;
  const void* w = nullptr;
  void* out = nullptr;
  std::int64_t x_stride = 0, w_stride = 0, out_stride = 0;
  const float* x_scale = nullptr;  // in device memory; e4m3 has both, others none
  const float* w_scale = nullptr;
};

// Opens it, which takes longer than a case may. False: there is none.
bool open_library();

// Whether it may take products of x [m, k] and w [n, k] of this type, if what they read and write
// is aligned to 16 bytes, rows too, and so is n. It adds up in one chain over k on tensor cores,
// never parts of it apart (split-K): f16 and bf16 as mma does, e4m3 with "fast accumulation", which
// keeps 13 fraction bits (numerics.md section 3).
bool library_takes(DType type, std::int64_t m, std::int64_t k);

// Queues the product, and says so; false, and nothing is queued, where it cannot make it. What it
// uses for a product of given sizes and strides is decided once.
bool library_matmul(const LibraryProduct& p, Stream& stream);

}  // namespace tp
