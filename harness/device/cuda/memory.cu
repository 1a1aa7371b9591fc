// Device memory and copies of one GPU.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "harness/device/buffer.h"
#include "harness/device/cuda/check.h"
#include "harness/device/cuda/queue.h"
#include "harness/device/memory.h"

namespace tp {

namespace {

using device_memory::Damage;
using device_memory::Damages;
using device_memory::Layout;

__device__ std::uint8_t byte_at(const Layout& layout, std::size_t at) {
  const bool payload = at >= layout.guard_bytes && at < layout.guard_bytes + layout.payload_bytes;
  return payload ? layout.poison : layout.guard;
}

// Guards and payload, a word at a time.
__global__ void fill_kernel(Layout layout, std::size_t bytes) {
  const std::size_t words = bytes / 4, stride = std::size_t{blockDim.x} * gridDim.x;
  auto* to = reinterpret_cast<std::uint32_t*>(layout.front);
  for (std::size_t w = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x; w < words; w += stride) {
    std::uint32_t word = 0;
    for (int i = 0; i < 4; ++i) word |= std::uint32_t{byte_at(layout, 4 * w + i)} << (8 * i);
    to[w] = word;
  }
  if (blockIdx.x == 0 && threadIdx.x < bytes % 4) {
    const std::size_t at = 4 * words + threadIdx.x;
    layout.front[at] = std::byte{byte_at(layout, at)};
  }
}

// One block with a thread for each byte of the two guards.
__global__ void inspect_kernel(Layout layout, Damages* damages) {
  __shared__ unsigned count[2], nearest[2];
  if (threadIdx.x < 2) {
    count[threadIdx.x] = 0;
    nearest[threadIdx.x] = 0xFFFFFFFFu;
  }
  __syncthreads();
  const unsigned guard = unsigned(layout.guard_bytes);
  const unsigned side = threadIdx.x / guard, distance = threadIdx.x % guard + 1;
  const std::byte* end = layout.front + layout.guard_bytes + layout.payload_bytes;
  const std::byte* at = side == 0 ? layout.front + guard - distance : end + (distance - 1);
  if (*at != std::byte{layout.guard}) {
    atomicAdd(&count[side], 1u);
    atomicMin(&nearest[side], distance);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    damages->before = {count[0], count[0] == 0 ? 0 : nearest[0]};
    damages->behind = {count[1], count[1] == 0 ? 0 : nearest[1]};
  }
}

__global__ void delay_kernel(int microseconds) {
  for (int i = 0; i < microseconds; ++i) __nanosleep(1000);
}

void launch_fill(const Layout& layout, cudaStream_t stream) {
  constexpr std::size_t kThreads = 256, kMaxBlocks = 2048;
  const std::size_t bytes = layout.payload_bytes + 2 * layout.guard_bytes;
  const std::size_t blocks =
      std::clamp<std::size_t>((bytes / 4 + kThreads - 1) / kThreads, 1, kMaxBlocks);
  fill_kernel<<<unsigned(blocks), unsigned(kThreads), 0, stream>>>(layout, bytes);
}

void enqueue(Stream& stream, const char* name, std::function<void(cudaStream_t)> hand_over) {
  stream.enqueue(
      std::make_unique<cuda::Submission>(name, cuda::Kind::harness, stream, std::move(hand_over)));
}

cuda::Queue& queue_of(Stream& stream) { return static_cast<cuda::Queue&>(stream.device_queue()); }

// Copies from or to pageable memory make the host wait for the stream, which may wait for another
// rank's host code: small ones go through pinned memory, large ones when the stream is complete.
bool is_small(std::size_t bytes) { return bytes <= cuda::kMaxPinned; }

void write_now(void* destination, const void* source, std::size_t bytes) {
  cuda::check(cudaMemcpy(destination, source, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  // It returns when the source has been read; kernels of other streams need it to have arrived.
  cuda::check(cudaStreamSynchronize(nullptr), "cudaMemcpy");
}

void copy_pinned(Stream& stream, void* destination, std::shared_ptr<std::byte> pinned,
                 std::size_t bytes, const void* source) {
  enqueue(stream, "a copy to the device", [=, &queue = queue_of(stream)](cudaStream_t to) {
    if (source != nullptr) std::memcpy(pinned.get(), source, bytes);
    cudaMemcpyAsync(destination, pinned.get(), bytes, cudaMemcpyHostToDevice, to);
    queue.keep(pinned);
  });
}

}  // namespace

namespace cuda {

void launch_delay(int microseconds, cudaStream_t stream) {
  delay_kernel<<<1, 1, 0, stream>>>(microseconds);
}

}  // namespace cuda

namespace device_memory {

void* allocate(std::size_t bytes, bool pooled) {
  if (pooled) return cuda::take_memory(bytes);
  void* memory = nullptr;
  cuda::check(cudaMalloc(&memory, std::max<std::size_t>(bytes, 1)), "cudaMalloc");
  return memory;
}

void free(void* memory, std::size_t bytes, bool pooled) {
  if (pooled) return cuda::give_memory(memory, bytes);
  // It would wait for a kernel that never ends. What else could go wrong has gone wrong before, and
  // is told by the stream.
  if (!device_is_lost()) cudaFree(memory);
}

void fill(Stream& stream, const Layout& layout) {
  enqueue(stream, "poison", [layout](cudaStream_t to) { launch_fill(layout, to); });
}

void fill_now(const Layout& layout) {
  launch_fill(layout, nullptr);
  cuda::check(cudaGetLastError(), "poison");
  // Ranks' streams do not wait for the default stream.
  cuda::check(cudaStreamSynchronize(nullptr), "poison");
}

void inspect(Stream& stream, const Layout& layout, std::shared_ptr<Damages> damages) {
  enqueue(stream, "a look at the guards", [=, &queue = queue_of(stream)](cudaStream_t to) {
    std::shared_ptr<std::byte> pinned = cuda::take_pinned(sizeof(Damages));
    inspect_kernel<<<1, unsigned(2 * layout.guard_bytes), 0, to>>>(
        layout, reinterpret_cast<Damages*>(pinned.get()));
    queue.deliver(std::move(pinned), damages.get(), sizeof(Damages), damages);
  });
}

std::size_t available() { return cuda::available_memory(); }

}  // namespace device_memory

void from_host(Stream& stream, void* destination, const void* source, std::size_t bytes) {
  if (bytes == 0) return;
  if (is_small(bytes)) {
    std::shared_ptr<std::byte> pinned = cuda::take_pinned(bytes);
    std::memcpy(pinned.get(), source, bytes);
    return copy_pinned(stream, destination, std::move(pinned), bytes, nullptr);
  }
  const auto* first = static_cast<const std::byte*>(source);
  stream.call([destination, copy = std::vector<std::byte>(first, first + bytes)] {
    write_now(destination, copy.data(), copy.size());
  });
}

void from_host_when_reached(Stream& stream, void* destination, const void* source,
                            std::size_t bytes) {
  if (bytes == 0) return;
  if (is_small(bytes))
    return copy_pinned(stream, destination, cuda::take_pinned(bytes), bytes, source);
  stream.call([=] { write_now(destination, source, bytes); });
}

void to_host(Stream& stream, void* destination, const void* source, std::size_t bytes) {
  if (bytes == 0) return;
  if (!is_small(bytes)) {
    return stream.call([=] {
      cuda::check(cudaMemcpy(destination, source, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
    });
  }
  enqueue(stream, "a copy to the host", [=, &queue = queue_of(stream)](cudaStream_t to) {
    std::shared_ptr<std::byte> pinned = cuda::take_pinned(bytes);
    cudaMemcpyAsync(pinned.get(), source, bytes, cudaMemcpyDeviceToHost, to);
    queue.deliver(std::move(pinned), destination, bytes);
  });
}

void poison(Stream& stream, const Buffer& buffer, std::uint8_t value) {
  enqueue(stream, "poison", [value, data = buffer.data(), bytes = buffer.bytes()](cudaStream_t to) {
    cudaMemsetAsync(data, value, bytes, to);
  });
}

}  // namespace tp
