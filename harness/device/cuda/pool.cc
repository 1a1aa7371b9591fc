#include "harness/device/cuda/pool.h"

#include <cuda.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdlib>
#include <map>
#include <new>
#include <utility>
#include <vector>

#include "harness/base/check.h"
#include "harness/device/cuda/check.h"

namespace tp::cuda {

namespace {

constexpr std::size_t kSmallest = 512;
constexpr std::size_t kLargestPart = std::size_t{1}
                                     << 20;  // larger ones are allocated by themselves
constexpr std::size_t kSlab = std::size_t{32} << 20;
constexpr std::size_t kLargeStep = std::size_t{2} << 20;
constexpr std::size_t kPinnedSlab = std::size_t{4} << 20;

// Before the first call to CUDA: streams that share a hardware queue wait for each other, and
// kernels of several ranks may wait for each other the other way round.
const bool environment = [] {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
  return true;
}();

// Parts of slabs, by size; never given back to the driver.
class Parts {
 public:
  Parts(std::size_t slab, void* (*allocate)(std::size_t)) : slab_(slab), allocate_(allocate) {}

  void* take(std::size_t bytes) {
    std::vector<void*>& free = free_[bytes];
    if (free.empty()) {
      if (left_ < bytes) {
        slab_at_ = static_cast<std::byte*>(allocate_(slab_));
        left_ = slab_;
      }
      left_ -= bytes;
      return std::exchange(slab_at_, slab_at_ + bytes);
    }
    void* memory = free.back();
    free.pop_back();
    return memory;
  }
  void give(void* memory, std::size_t bytes) { free_[bytes].push_back(memory); }

 private:
  std::size_t slab_;
  void* (*allocate_)(std::size_t);
  std::byte* slab_at_ = nullptr;
  std::size_t left_ = 0;
  std::map<std::size_t, std::vector<void*>> free_;
};

std::size_t part_size(std::size_t bytes) { return std::bit_ceil(std::max(bytes, kSmallest)); }
std::size_t large_size(std::size_t bytes) {
  return (bytes + kLargeStep - 1) / kLargeStep * kLargeStep;
}

// All of these live as long as the process: nothing is torn down while the GPU may be at work.
std::map<std::size_t, std::vector<void*>>& large_free() {
  static auto& free = *new std::map<std::size_t, std::vector<void*>>;
  return free;
}

void release_large() {
  for (auto& [bytes, blocks] : large_free()) {
    for (void* block : blocks) cudaFree(block);
  }
  large_free().clear();
}

void* allocate_device(std::size_t bytes) {
  void* memory = nullptr;
  if (cudaMalloc(&memory, bytes) == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    release_large();
    check(cudaMalloc(&memory, bytes), "cudaMalloc");
  }
  check(cudaGetLastError(), "cudaMalloc");
  return memory;
}

void* allocate_pinned(std::size_t bytes) {
  void* memory = nullptr;
  check(cudaHostAlloc(&memory, bytes, cudaHostAllocDefault), "cudaHostAlloc");
  return memory;
}

Parts& device_parts() {
  static auto& parts = *new Parts(kSlab, allocate_device);
  return parts;
}
Parts& pinned_parts() {
  static auto& parts = *new Parts(kPinnedSlab, allocate_pinned);
  return parts;
}

template <typename T>
std::vector<T>& spare() {
  static auto& all = *new std::vector<T>;
  return all;
}

// The driver's own function, found through the runtime so that libcuda need not be linked.
using WriteValue = CUresult (*)(CUstream, CUdeviceptr, cuuint32_t, unsigned);
WriteValue write_value() {
  static const WriteValue function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(cudaGetDriverEntryPointByVersion("cuStreamWriteValue32", &found, 12000, cudaEnableDefault,
                                           &result),
          "cuStreamWriteValue32");
    if (result != cudaDriverEntryPointSuccess)
      throw Unavailable("the NVIDIA driver has no cuStreamWriteValue32");
    return reinterpret_cast<WriteValue>(found);
  }();
  return function;
}

}  // namespace

void* take_memory(std::size_t bytes) {
  if (bytes <= kLargestPart) return device_parts().take(part_size(bytes));
  std::vector<void*>& free = large_free()[large_size(bytes)];
  if (free.empty()) return allocate_device(large_size(bytes));
  void* memory = free.back();
  free.pop_back();
  return memory;
}

void give_memory(void* memory, std::size_t bytes) {
  if (bytes <= kLargestPart) {
    device_parts().give(memory, part_size(bytes));
  } else {
    large_free()[large_size(bytes)].push_back(memory);
  }
}

std::size_t available_memory() {
  std::size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  for (const auto& [bytes, blocks] : large_free()) free += bytes * blocks.size();
  return free;
}

std::shared_ptr<std::byte> take_pinned(std::size_t bytes) {
  TP_CHECK(bytes <= kMaxPinned, "too much pinned memory at once");
  const std::size_t size = part_size(bytes);
  return {static_cast<std::byte*>(pinned_parts().take(size)),
          [size](std::byte* memory) { pinned_parts().give(memory, size); }};
}

cudaError_t CountedStream::count() noexcept {
  const CUresult result = write_value()(stream, reinterpret_cast<CUdeviceptr>(completed),
                                        ++submitted, CU_STREAM_WRITE_VALUE_DEFAULT);
  if (result == CUDA_SUCCESS) return cudaSuccess;
  const cudaError_t broken = query(stream);  // what it was, in the runtime's own words
  return broken == cudaSuccess || broken == cudaErrorNotReady ? cudaErrorUnknown : broken;
}

std::uint32_t CountedStream::seen() const { return __atomic_load_n(completed, __ATOMIC_ACQUIRE); }

std::unique_ptr<CountedStream> take_stream() {
  auto& free = spare<std::unique_ptr<CountedStream>>();
  if (!free.empty()) {
    std::unique_ptr<CountedStream> stream = std::move(free.back());
    free.pop_back();
    return stream;
  }
  write_value();  // or say now that there is none
  auto stream = std::make_unique<CountedStream>();
  check(cudaStreamCreateWithFlags(&stream->stream, cudaStreamNonBlocking), "cudaStreamCreate");
  stream->completed = static_cast<std::uint32_t*>(pinned_parts().take(kSmallest));
  *stream->completed = 0;
  return stream;
}

void give_stream(std::unique_ptr<CountedStream> stream) {
  spare<std::unique_ptr<CountedStream>>().push_back(std::move(stream));
}

std::shared_ptr<CUevent_st> take_event(bool timed) {
  static auto& all = *new std::array<std::vector<cudaEvent_t>, 2>;  // untimed, timed
  std::vector<cudaEvent_t>& free = all[timed];
  cudaEvent_t event = nullptr;
  if (free.empty()) {
    check(cudaEventCreateWithFlags(&event, timed ? cudaEventDefault : cudaEventDisableTiming),
          "cudaEventCreate");
  } else {
    event = free.back();
    free.pop_back();
  }
  return {event, [&free](cudaEvent_t event) { free.push_back(event); }};
}

}  // namespace tp::cuda
