#include "harness/device/buffer.h"

#include <fmt/format.h>

#include <utility>
#include <vector>

#include "harness/device/memory.h"
#include "harness/device/sanitizer.h"
#include "harness/device/scheduler.h"

namespace tp {

Buffer::Buffer(std::string name, std::size_t bytes, std::uint8_t poison)
    : name_(std::move(name)), bytes_(bytes), guard_(poison ^ 0x5A) {
  auto* front = static_cast<std::byte*>(device_memory::allocate(bytes + 2 * kGuard));
  payload_ = front + kGuard;
  device_memory::fill(front, guard_, kGuard);
  device_memory::fill(payload_, poison, bytes);
  device_memory::fill(front + kGuard + bytes, guard_, kGuard);
  fence_off(front, kGuard);
  fence_off(front + kGuard + bytes, kGuard);
}

Buffer::~Buffer() { release(); }

Buffer::Buffer(Buffer&& other) noexcept
    : name_(std::move(other.name_)),
      bytes_(other.bytes_),
      guard_(other.guard_),
      payload_(std::exchange(other.payload_, nullptr)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  if (this == &other) return *this;
  release();
  name_ = std::move(other.name_);
  bytes_ = other.bytes_;
  guard_ = other.guard_;
  payload_ = std::exchange(other.payload_, nullptr);
  return *this;
}

void Buffer::release() {
  if (payload_ == nullptr) return;
  auto* front = static_cast<std::byte*>(std::exchange(payload_, nullptr)) - kGuard;
  const auto free = [front, bytes = bytes_ + 2 * kGuard] {
    open_up(front, bytes);
    device_memory::free(front);
  };
  Scheduler* scheduler = Scheduler::current();
  if (scheduler == nullptr || scheduler->streams_are_empty()) {
    free();
  } else {
    scheduler->release_later(free);
  }
}

std::optional<std::string> Buffer::check_guards() const {
  const auto* front = static_cast<const std::byte*>(payload_) - kGuard;
  const auto* back = front + kGuard + bytes_;
  std::vector<std::uint8_t> bytes(2 * kGuard);
  open_up(front, kGuard);
  open_up(back, kGuard);
  device_memory::read(bytes.data(), front, kGuard);
  device_memory::read(bytes.data() + kGuard, back, kGuard);
  fence_off(front, kGuard);
  fence_off(back, kGuard);
  for (const bool after : {true, false}) {
    std::size_t written = 0;
    std::size_t nearest = 0;  // distance from the payload, 1 being next to it
    for (std::size_t distance = kGuard; distance >= 1; --distance) {
      const std::size_t i = after ? kGuard + distance - 1 : kGuard - distance;
      if (bytes[i] == guard_) continue;
      ++written;
      nearest = distance;
    }
    if (written == 0) continue;
    const std::size_t gap = after ? nearest - 1 : nearest;
    return fmt::format("{}: {} bytes written {} its {} bytes, the nearest {} bytes {}", name_,
                       written, after ? "behind" : "before", bytes_, gap,
                       after ? "past the end" : "before the start");
  }
  return std::nullopt;
}

// Calls, and no copies of the device's own stream: one from or to pageable memory would block all
// ranks until that stream got there, while a call waits by asking.
void from_host(Stream& stream, void* destination, const void* source, std::size_t bytes) {
  const auto* first = static_cast<const std::byte*>(source);
  stream.call([destination, copy = std::vector<std::byte>(first, first + bytes)] {
    device_memory::write(destination, copy.data(), copy.size());
  });
}

void from_host_when_reached(Stream& stream, void* destination, const void* source,
                            std::size_t bytes) {
  stream.call([=] { device_memory::write(destination, source, bytes); });
}

void to_host(Stream& stream, void* destination, const void* source, std::size_t bytes) {
  stream.call([=] { device_memory::read(destination, source, bytes); });
}

}  // namespace tp
