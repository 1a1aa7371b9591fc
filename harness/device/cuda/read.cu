#include <cuda_runtime.h>

#include <memory>

#include "harness/device/cache.h"
#include "harness/device/cuda/check.h"
#include "harness/device/cuda/gpu.h"
#include "harness/device/cuda/queue.h"
#include "harness/device/cuda/read.h"

namespace tp {

namespace cuda {

namespace {

constexpr int kThreads = 512, kInFlight = 8;  // loads of a thread

// `never` is never true, which only the host knows: so that nothing is left out.
__global__ void __launch_bounds__(kThreads)
    read_kernel(const uint4* from, std::size_t count, int passes, bool never, unsigned* out) {
  const std::size_t stride = std::size_t{gridDim.x} * kThreads,
                    first = std::size_t{blockIdx.x} * kThreads + threadIdx.x;
  unsigned mixed = 0;
  for (int pass = 0; pass < passes; ++pass) {
    for (std::size_t i = first; i < count; i += kInFlight * stride) {
      uint4 read[kInFlight] = {};
#pragma unroll
      for (int j = 0; j < kInFlight; ++j)
        if (i + j * stride < count) read[j] = __ldcg(from + i + j * stride);
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) mixed ^= read[j].x ^ read[j].y ^ read[j].z ^ read[j].w;
    }
  }
  if (never) *out = mixed;
}

}  // namespace

void launch_read(const void* from, std::size_t bytes, int passes, cudaStream_t stream) {
  const int blocks = 4 * attribute(cudaDevAttrMultiProcessorCount);
  read_kernel<<<unsigned(blocks), kThreads, 0, stream>>>(
      static_cast<const uint4*>(from), bytes / sizeof(uint4), passes, false, nullptr);
}

std::size_t l2_bytes() { return std::size_t(attribute(cudaDevAttrL2CacheSize)); }

}  // namespace cuda

void sweep_caches(Stream& stream) {
  struct Memory {
    std::size_t bytes = 4 * cuda::l2_bytes();
    void* data = nullptr;
    Memory() {
      cuda::check(cudaMalloc(&data, bytes), "cudaMalloc");
      cuda::check(cudaMemset(data, 1, bytes), "cudaMemset");
      cuda::check(cudaDeviceSynchronize(), "cudaMemset");
    }
  };
  static const Memory memory;  // the GPU may still read it at exit
  stream.enqueue(std::make_unique<cuda::Submission>(
      "sweep_caches", cuda::Kind::harness, stream,
      [](cudaStream_t to) { cuda::launch_read(memory.data, memory.bytes, 1, to); }));
}

}  // namespace tp
