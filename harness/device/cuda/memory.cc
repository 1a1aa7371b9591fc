// Device memory and copies of one GPU.

#include "harness/device/memory.h"

#include <memory>

#include "harness/device/buffer.h"
#include "harness/device/cuda/check.h"
#include "harness/device/cuda/queue.h"

namespace tp {
namespace device_memory {

void* allocate(std::size_t bytes) {
  void* memory = nullptr;
  cuda::check(cudaMalloc(&memory, bytes), "cudaMalloc");  // aligned to 256 bytes at least
  return memory;
}

// What could go wrong here has gone wrong before, and is told by the stream.
void free(void* memory) { cudaFree(memory); }

void fill(void* memory, std::uint8_t value, std::size_t bytes) {
  cuda::check(cudaMemset(memory, value, bytes), "cudaMemset");
  // Ranks' streams do not wait for the default stream.
  cuda::check(cudaStreamSynchronize(nullptr), "cudaMemset");
}

void read(void* destination, const void* source, std::size_t bytes) {
  cuda::check(cudaMemcpy(destination, source, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
}

void write(void* destination, const void* source, std::size_t bytes) {
  cuda::check(cudaMemcpy(destination, source, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  // It returns when the source has been read; kernels of other streams need it to have arrived.
  cuda::check(cudaStreamSynchronize(nullptr), "cudaMemcpy");
}

}  // namespace device_memory

void poison(Stream& stream, Buffer& buffer, std::uint8_t value) {
  const auto submit = [value, data = buffer.data(), bytes = buffer.bytes()](cudaStream_t to) {
    cudaMemsetAsync(data, value, bytes, to);
  };
  stream.enqueue(std::make_unique<cuda::Submission>("poison", stream, submit));
}

}  // namespace tp
