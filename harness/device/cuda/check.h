#pragma once
// What a CUDA error becomes.

#include <cuda_runtime_api.h>

#include <string_view>

#include "harness/device/fault.h"

namespace tp::cuda {

// Throws Unavailable without a usable GPU, std::bad_alloc for lack of memory, and Fault otherwise:
// BadLaunch for what was refused; Crash where the device is broken, which is then lost
// (device_is_lost). Whoever calls next is told of that, so the fault names who was at work then.
void check(cudaError_t error, std::string_view what, int tp_rank = -1);

// Asks whether the stream is complete; cudaErrorNotReady if it is not. As cudaStreamQuery, but that
// no launch after it is told of that as of an error.
cudaError_t query(cudaStream_t stream) noexcept;

// Whether the error leaves the device unusable for this process.
bool breaks_device(cudaError_t error);
void lose_device();

// Who was at work when the device broke, as far as its streams tell; else as `otherwise` says.
Fault culprit(cudaError_t error, Fault otherwise);

}  // namespace tp::cuda
