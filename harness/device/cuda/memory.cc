// Device memory and copies of one GPU.

#include "harness/device/memory.h"

#include <memory>
#include <vector>

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

}  // namespace device_memory

void from_host(Stream& stream, void* destination, const void* source, std::size_t bytes) {
  const auto* first = static_cast<const std::byte*>(source);
  const auto submit = [destination,
                       copy = std::vector<std::byte>(first, first + bytes)](cudaStream_t to) {
    // From pageable memory CUDA has taken the data when this returns.
    cudaMemcpyAsync(destination, copy.data(), copy.size(), cudaMemcpyHostToDevice, to);
  };
  stream.enqueue(std::make_unique<cuda::Submission>("from_host", stream, submit));
}

void from_host_when_reached(Stream& stream, void* destination, const void* source,
                            std::size_t bytes) {
  const auto submit = [=](cudaStream_t to) {
    cudaMemcpyAsync(destination, source, bytes, cudaMemcpyHostToDevice, to);
  };
  stream.enqueue(std::make_unique<cuda::Submission>("from_host", stream, submit));
}

void to_host(Stream& stream, void* destination, const void* source, std::size_t bytes) {
  // A copy to pageable memory would block all ranks until the stream got there; a call waits by
  // asking.
  stream.call([=] { device_memory::read(destination, source, bytes); });
}

void poison(Stream& stream, Buffer& buffer, std::uint8_t value) {
  const auto submit = [value, data = buffer.data(), bytes = buffer.bytes()](cudaStream_t to) {
    cudaMemsetAsync(data, value, bytes, to);
  };
  stream.enqueue(std::make_unique<cuda::Submission>("poison", stream, submit));
}

}  // namespace tp
