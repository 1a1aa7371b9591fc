#include <cuda_runtime.h>

#include "harness/device/cuda/built_for.h"

#define TP_STRING_OF(...) #__VA_ARGS__
#define TP_STRING(...) TP_STRING_OF(__VA_ARGS__)

namespace tp::cuda {

namespace {
__global__ void any_kernel() {}
}  // namespace

const char* architectures() { return TP_STRING(__CUDA_ARCH_LIST__); }

cudaError_t find_kernel_for_gpu() {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, any_kernel);
}

}  // namespace tp::cuda
