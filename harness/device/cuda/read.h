#pragma once
// Reads memory as fast as the GPU can.

#include <cuda_runtime_api.h>

#include <cstddef>

namespace tp::cuda {

// All bytes (a multiple of 16) `passes` times, past the first-level cache.
void launch_read(const void* from, std::size_t bytes, int passes, cudaStream_t stream);

std::size_t l2_bytes();

}  // namespace tp::cuda
