// Device memory and copies where the device is this process.

#include "harness/device/memory.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "harness/device/buffer.h"

namespace tp {
namespace device_memory {

void* allocate(std::size_t bytes) { return ::operator new (bytes, std::align_val_t{256}); }
void free(void* memory) { ::operator delete (memory, std::align_val_t{256}); }
void fill(void* memory, std::uint8_t value, std::size_t bytes) {
  std::memset(memory, value, bytes);
}
void read(void* destination, const void* source, std::size_t bytes) {
  std::memcpy(destination, source, bytes);
}

}  // namespace device_memory

void from_host(Stream& stream, void* destination, const void* source, std::size_t bytes) {
  const auto* first = static_cast<const std::byte*>(source);
  stream.call([destination, copy = std::vector<std::byte>(first, first + bytes)] {
    if (!copy.empty()) std::memcpy(destination, copy.data(), copy.size());
  });
}

void from_host_when_reached(Stream& stream, void* destination, const void* source,
                            std::size_t bytes) {
  stream.call([=] {
    if (bytes > 0) std::memcpy(destination, source, bytes);
  });
}

void to_host(Stream& stream, void* destination, const void* source, std::size_t bytes) {
  stream.call([=] {
    if (bytes > 0) std::memcpy(destination, source, bytes);
  });
}

void poison(Stream& stream, Buffer& buffer, std::uint8_t value) {
  stream.call(
      [value, data = buffer.data(), bytes = buffer.bytes()] { std::memset(data, value, bytes); });
}

}  // namespace tp
