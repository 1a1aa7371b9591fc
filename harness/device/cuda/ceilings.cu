// t0 and the copy bandwidth, as shared measurements of this project take them: a graph of dependent
// small kernels, and a copy that fills the GPU.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <exception>

#include "harness/device/ceilings.h"
#include "harness/device/cuda/check.h"
#include "harness/device/cuda/gpu.h"
#include "harness/device/cuda/read.h"

namespace tp {

namespace {

constexpr int kNodes = 100, kRepeats = 7;
constexpr std::size_t kCopied = std::size_t{256} << 20, kInL2 = std::size_t{16} << 20;

__global__ void next(float4* cell) {
  float4 value = *cell;
  value.x += 1.0f;
  *cell = value;
}

// The fastest of some repeats, in microseconds.
template <typename F>
double fastest_us(cudaStream_t stream, F submit) {
  cudaEvent_t begin = nullptr, end = nullptr;
  cuda::check(cudaEventCreate(&begin), "cudaEventCreate");
  cuda::check(cudaEventCreate(&end), "cudaEventCreate");
  float fastest = 0;
  for (int i = 0; i <= kRepeats; ++i) {  // one to warm up
    cudaEventRecord(begin, stream);
    cuda::check(submit(), "measuring the ceilings");
    cudaEventRecord(end, stream);
    cuda::check(cudaStreamSynchronize(stream), "measuring the ceilings");
    float milliseconds = 0;
    cuda::check(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
    if (i > 0) fastest = i == 1 ? milliseconds : std::min(fastest, milliseconds);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return double(fastest) * 1e3;
}

double launch_us(cudaStream_t stream) {
  float4* cell = nullptr;
  cuda::check(cudaMalloc(&cell, sizeof(float4)), "cudaMalloc");
  cuda::check(cudaMemset(cell, 0, sizeof(float4)), "cudaMemset");
  cuda::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < kNodes; ++i) next<<<1, 1, 0, stream>>>(cell);
  cudaGraph_t captured = nullptr;
  cudaGraphExec_t graph = nullptr;
  cuda::check(cudaStreamEndCapture(stream, &captured), "capture");
  cuda::check(cudaGraphInstantiate(&graph, captured, 0), "cudaGraphInstantiate");
  const double us = fastest_us(stream, [&] { return cudaGraphLaunch(graph, stream); });
  cudaGraphExecDestroy(graph);
  cudaGraphDestroy(captured);
  cudaFree(cell);
  return us / kNodes;
}

double bytes_per_us(cudaStream_t stream) {
  std::byte* memory = nullptr;
  cuda::check(cudaMalloc(&memory, 2 * kCopied), "cudaMalloc");
  cuda::check(cudaMemset(memory, 1, 2 * kCopied), "cudaMemset");
  const double us = fastest_us(stream, [&] {
    return cudaMemcpyAsync(memory + kCopied, memory, kCopied, cudaMemcpyDeviceToDevice, stream);
  });
  cudaFree(memory);
  return 2 * double(kCopied) / us;
}

double read_bytes_per_us(std::size_t bytes, int passes, cudaStream_t stream) {
  void* memory = nullptr;
  cuda::check(cudaMalloc(&memory, bytes), "cudaMalloc");
  cuda::check(cudaMemset(memory, 1, bytes), "cudaMemset");
  const double us = fastest_us(stream, [&] {
    cuda::launch_read(memory, bytes, passes, stream);
    return cudaGetLastError();
  });
  cudaFree(memory);
  return double(bytes) * passes / us;
}

// Clocks of all multiprocessors together in a microsecond.
double clocks_per_us() {
  return cuda::attribute(cudaDevAttrMultiProcessorCount) *
         double(cuda::attribute(cudaDevAttrClockRate)) * 1e-3;
}

constexpr double kLanes = 128;  // fp32 of a multiprocessor from sm_86 on, a fused step in each

// f16 or bf16 products and additions of a multiprocessor in a clock, from NVIDIA's data sheets. Of
// a GPU that is not known yet the most, so that a floor stays one.
double matrix_flops_per_clock() {
  const int capability = 10 * cuda::attribute(cudaDevAttrComputeCapabilityMajor) +
                         cuda::attribute(cudaDevAttrComputeCapabilityMinor);
  if (capability == 80) return 2048;
  if (capability == 86 || capability == 89) return 1024;
  return capability == 90 ? 4096 : 8192;
}

}  // namespace

const std::optional<Ceilings>& ceilings() {
  static const std::optional<Ceilings> measured = [] {
    std::optional<Ceilings> c;
    // Without them there are no ratios; nothing else depends on them.
    try {
      cudaStream_t stream = nullptr;
      cuda::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
      c = {.launch_us = launch_us(stream),
           .bytes_per_us = bytes_per_us(stream),
           .read_bytes_per_us = read_bytes_per_us(2 * kCopied, 1, stream),
           .l2_bytes = double(cuda::l2_bytes()),
           .l2_bytes_per_us = read_bytes_per_us(kInL2, 64, stream),
           .flops_per_us = clocks_per_us() * kLanes * 2,
           .matrix_flops_per_us = clocks_per_us() * matrix_flops_per_clock()};
      cudaStreamDestroy(stream);
      if (!(c->launch_us > 0 && c->bytes_per_us > 0 && c->flops_per_us > 0)) c.reset();
    } catch (const Fault&) {
    } catch (const std::exception&) {
    }
    return c;
  }();
  return measured;
}

}  // namespace tp
