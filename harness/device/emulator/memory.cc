// Device memory and copies where the device is this process.

#include "harness/device/memory.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "harness/device/buffer.h"

namespace tp {
namespace device_memory {

void* allocate(std::size_t bytes) { return ::operator new (bytes, std::align_val_t{256}); }
void free(void* memory) { ::operator delete (memory, std::align_val_t{256}); }
void fill(void* memory, std::uint8_t value, std::size_t bytes) {
  std::memset(memory, value, bytes);
}
void read(void* destination, const void* source, std::size_t bytes) {
  if (bytes > 0) std::memcpy(destination, source, bytes);
}
void write(void* destination, const void* source, std::size_t bytes) {
  if (bytes > 0) std::memcpy(destination, source, bytes);
}

}  // namespace device_memory

void poison(Stream& stream, Buffer& buffer, std::uint8_t value) {
  stream.call(
      [value, data = buffer.data(), bytes = buffer.bytes()] { std::memset(data, value, bytes); });
}

}  // namespace tp
