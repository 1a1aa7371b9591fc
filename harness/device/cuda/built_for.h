#pragma once
// Which GPUs this build's kernels are for.

#include <cuda_runtime_api.h>

namespace tp::cuda {

const char* architectures();        // "800,900"
cudaError_t find_kernel_for_gpu();  // an error if there is none for the GPU in use

}  // namespace tp::cuda
