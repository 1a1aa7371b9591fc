#include "harness/device/emulator/shared_memory.h"

#include <fmt/format.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "harness/device/emulator/fence_bytes.h"
#include "harness/device/sanitizer.h"

namespace tp::emulator {
namespace {

// TSan: no memory is used by two blocks, so that nothing about the first is forgotten before the
// launch is over. ASan fences what malloc returned, so there the memory is malloc's, and not used
// twice.
constexpr std::size_t kFence = kAsan ? 0 : 128;

std::uint8_t fence_byte(std::uint8_t poison) { return poison ^ 0x5A; }

}  // namespace

SharedMemory::~SharedMemory() {
  const Overlooked overlooked;
  for (void* memory : free_) std::free(static_cast<std::byte*>(memory) - kFence);
}

void* SharedMemory::take() {
  std::byte* raw;
  if (!kTsan && !free_.empty()) {
    raw = static_cast<std::byte*>(free_.back()) - kFence;
    free_.pop_back();
  } else {
    raw = static_cast<std::byte*>(std::malloc(bytes_ + 2 * kFence));
    if (raw == nullptr) throw std::bad_alloc();
  }
  std::memset(raw, fence_byte(poison_), kFence);
  std::memset(raw + kFence, poison_, bytes_);
  std::memset(raw + kFence + bytes_, fence_byte(poison_), kFence);
  return raw + kFence;
}

void SharedMemory::give(void* memory) {
  if (kAsan) {
    std::free(memory);
  } else {
    free_.push_back(memory);
  }
}

std::optional<std::string> SharedMemory::check(const void* memory) const {
  const auto* payload = static_cast<const std::uint8_t*>(memory);
  if (all_bytes(payload - kFence, kFence, fence_byte(poison_)) &&
      all_bytes(payload + bytes_, kFence, fence_byte(poison_)))
    return std::nullopt;
  for (std::size_t i = 0; i < kFence; ++i) {
    if (payload[bytes_ + i] != fence_byte(poison_)) {
      return fmt::format("wrote its shared memory at byte {}, but has {} bytes", bytes_ + i,
                         bytes_);
    }
  }
  for (std::size_t i = 1; i <= kFence; ++i) {
    if (*(payload - i) != fence_byte(poison_)) {
      return fmt::format("wrote its shared memory {} bytes before its start", i);
    }
  }
  return std::nullopt;
}

}  // namespace tp::emulator
