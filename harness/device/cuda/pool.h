#pragma once
// Memory, streams and events of one GPU that are used again and again: to get a new one takes the
// driver longer than most kernels run, and may make it wait for all of them.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>

namespace tp::cuda {

// Device memory. What is given back must no longer be in use by anybody.
void* take_memory(std::size_t bytes);  // 512-byte aligned; throws std::bad_alloc
void give_memory(void* memory, std::size_t bytes);
std::size_t available_memory();

// Host memory that the GPU reaches, too. The last one that has it gives it back.
inline constexpr std::size_t kMaxPinned = std::size_t{1} << 20;
std::shared_ptr<std::byte> take_pinned(std::size_t bytes);  // at most kMaxPinned

// A stream with a counter of what it has completed, which the GPU itself writes: to look at it
// takes no call, and it can still be read when the device is broken.
struct CountedStream {
  cudaStream_t stream = nullptr;
  std::uint32_t submitted = 0;
  std::uint32_t* completed = nullptr;  // pinned

  // Counts what was submitted so far.
  cudaError_t count() noexcept;
  std::uint32_t seen() const;  // completed so far
};
std::unique_ptr<CountedStream> take_stream();
void give_stream(std::unique_ptr<CountedStream> stream);  // complete

// An event; the last one that has it gives it back.
std::shared_ptr<CUevent_st> take_event(bool timed);

}  // namespace tp::cuda
