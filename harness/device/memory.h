#pragma once
// Raw device memory, for Buffer: what a backend must be able to do, at once and not in a stream.

#include <cstddef>
#include <cstdint>

namespace tp::device_memory {

void* allocate(std::size_t bytes);  // 256-byte aligned; throws std::bad_alloc
void free(void* memory);
void fill(void* memory, std::uint8_t value, std::size_t bytes);
void read(void* destination, const void* source, std::size_t bytes);   // to host memory
void write(void* destination, const void* source, std::size_t bytes);  // from host memory

}  // namespace tp::device_memory
