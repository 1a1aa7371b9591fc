#pragma once
// Kernels that the speed of the emulator is measured with.

#include "harness/device/stream.h"

namespace tp::testing {

// A block a row: a strided loop, one block_sum, a strided tail.
void rms_norm_like(Stream& stream, const float* x, float* out, int rows, int cols, int threads);
// out = 2 x, one element a thread.
void elementwise(Stream& stream, const float* x, float* out, int blocks, int threads);

}  // namespace tp::testing
