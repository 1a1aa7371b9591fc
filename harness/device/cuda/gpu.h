#pragma once
// Which GPU this process uses.

#include <cuda_runtime_api.h>

#include <string>

namespace tp::cuda {

// GPUs that this process may use. Throws Unavailable, saying why, if there is none.
int gpu_count();

struct Gpu {
  std::string name;   // "NVIDIA H100 80GB HBM3 (sm_90)"
  std::string built;  // "CUDA 13.0, driver for 13.0"
  std::string id;     // of the device itself, whatever number it has
};

// Makes it the one that this process uses from now on. Throws Unavailable, saying why, if this
// build's kernels cannot run there.
Gpu open_gpu(int index);

// Of the one that is open.
int attribute(cudaDeviceAttr which);

}  // namespace tp::cuda
