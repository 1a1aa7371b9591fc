#pragma once
// Device memory with guards, for Buffer: what a backend must be able to do.

#include <cstddef>
#include <cstdint>
#include <memory>

#include "harness/device/stream.h"

namespace tp::device_memory {

// guard | payload | guard. Without a guard, memory is left as it is found.
struct Layout {
  std::byte* front = nullptr;
  std::size_t guard_bytes = 0;  // of each guard
  std::size_t payload_bytes = 0;
  std::uint8_t guard = 0;   // every byte of the guards
  std::uint8_t poison = 0;  // every byte of the payload, at first

  std::byte* payload() const { return front + guard_bytes; }
  std::size_t bytes() const { return payload_bytes + 2 * guard_bytes; }
};

// What was written into one guard. The nearest byte's distance from the payload, 1 being next to
// it.
struct Damage {
  std::uint32_t bytes = 0;
  std::uint32_t nearest = 0;
};
struct Damages {
  Damage before, behind;
};

// 256-byte aligned; throws std::bad_alloc. The memory of a layout without guards is the driver's
// own, and nobody's before or after: so that compute-sanitizer sees who leaves it.
void* allocate(std::size_t bytes, bool pooled);
void free(void* memory, std::size_t bytes, bool pooled);

// Asynchronous: fills guards and payload; finds what was written into the guards, which is in
// `damages` once the stream is complete.
void fill(Stream& stream, const Layout& layout);
void inspect(Stream& stream, const Layout& layout, std::shared_ptr<Damages> damages);
// At once.
void fill_now(const Layout& layout);

// Bytes that allocate() could still give; the largest number where nobody knows.
std::size_t available();

}  // namespace tp::device_memory
