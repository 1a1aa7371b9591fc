#pragma once
// Bytes beside memory that nobody may write: as long as they are what they were, one look tells.

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace tp::emulator {

// Whether all of `count` bytes are `value`, at the speed of memcmp: the first is, and each is what
// the one before it is.
inline bool all_bytes(const void* begin, std::size_t count, std::uint8_t value) {
  const auto* first = static_cast<const std::uint8_t*>(begin);
  return count == 0 || (*first == value && std::memcmp(first, first + 1, count - 1) == 0);
}

}  // namespace tp::emulator
