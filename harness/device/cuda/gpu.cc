#include "harness/device/cuda/gpu.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cstdlib>

#include "harness/base/check.h"
#include "harness/device/cuda/built_for.h"
#include "harness/device/cuda/check.h"

namespace tp::cuda {

namespace {

std::string host() {
  char name[256] = "this machine";
  gethostname(name, sizeof(name) - 1);
  return name;
}

std::string version(int number) { return fmt::format("{}.{}", number / 1000, number % 1000 / 10); }

}  // namespace

int gpu_count() {
  int driver = 0, runtime = 0, count = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0) throw Unavailable(fmt::format("no NVIDIA driver on {}", host()));
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver) {
    throw Unavailable(fmt::format("the NVIDIA driver of {} is for CUDA {}, and this build needs {}",
                                  host(), version(driver), version(runtime)));
  }
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
    const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
    throw Unavailable(
        fmt::format("no NVIDIA GPU on {}{}", host(),
                    visible ? fmt::format(" with CUDA_VISIBLE_DEVICES={}", visible) : ""));
  }
  if (error != cudaSuccess) {
    throw Unavailable(
        fmt::format("the GPUs of {} cannot be used: {}", host(), cudaGetErrorString(error)));
  }
  return count;
}

Gpu open_gpu(int index) {
  const auto usable = [&](cudaError_t error) {
    if (error != cudaSuccess)
      throw Unavailable(
          fmt::format("GPU {} of {} cannot be used: {}", index, host(), cudaGetErrorString(error)));
  };
  cudaDeviceProp properties{};
  usable(cudaGetDeviceProperties(&properties, index));
  const std::string sm = fmt::format("{}{}", properties.major, properties.minor);
  usable(cudaSetDevice(index));
  usable(cudaFree(nullptr));  // makes the context
  const cudaError_t error = find_kernel_for_gpu();
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    throw Unavailable(fmt::format(
        "GPU {} of {}, {}, has compute capability {}.{}, and this build has kernels for "
        "{}: configure with -DCMAKE_CUDA_ARCHITECTURES={}",
        index, host(), properties.name, properties.major, properties.minor, architectures(), sm));
  }
  usable(error);
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  return {fmt::format("{} (sm_{})", properties.name, sm),
          fmt::format("CUDA {}, driver for {}", version(runtime), version(driver)),
          host() + std::string(properties.uuid.bytes, sizeof(properties.uuid.bytes))};
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace tp::cuda
