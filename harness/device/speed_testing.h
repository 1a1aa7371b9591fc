#pragma once
// Kernels that the speed of the emulator is measured with.

#include "harness/base/dtype.h"
#include "harness/device/stream.h"

namespace tp::testing {

// A block a row: a strided loop, one block_sum, a strided tail.
void rms_norm_like(Stream& stream, const float* x, float* out, int rows, int cols, int threads);
// out = 2 x, one element a thread.
void elementwise(Stream& stream, const float* x, float* out, int blocks, int threads);

// Each warp: `count` products of one tile of shared memory, each with loads of both operands if
// `loads`. 3 KiB of x a block; out has an element a thread.
void products(Stream& stream, const bf16* x, float* out, int blocks, int threads, int count,
              bool loads);
// Each thread: `count` copies of 16 bytes, in groups of 4.
void copies(Stream& stream, const float* x, float* out, int blocks, int threads, int count);
// Each thread: `count` calls of quad_sum.
void quad_sums(Stream& stream, const float* x, float* out, int blocks, int threads, int count);

}  // namespace tp::testing
