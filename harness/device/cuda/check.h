#pragma once
// What a CUDA error becomes.

#include <cuda_runtime_api.h>

#include <string_view>

namespace tp::cuda {

// Throws Unavailable without a usable GPU, std::bad_alloc for lack of memory, and Fault otherwise:
// BadLaunch for what was refused, Crash for what broke the device, which is then lost
// (device_is_lost).
void check(cudaError_t error, std::string_view what, int tp_rank = -1);

// Whether the error leaves the device unusable for this process.
bool breaks_device(cudaError_t error);
void lose_device();

}  // namespace tp::cuda
