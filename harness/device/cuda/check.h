#pragma once
// What a CUDA error becomes.

#include <cuda_runtime_api.h>

#include <string_view>

namespace tp::cuda {

// Throws Unavailable without a usable GPU, std::bad_alloc for lack of memory, and Fault otherwise.
void check(cudaError_t error, std::string_view what, int tp_rank = -1);

}  // namespace tp::cuda
