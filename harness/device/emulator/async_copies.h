#pragma once
// The asynchronous copies that a thread has begun and not yet waited for.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "harness/device/emulator/where.h"

namespace tp::emulator {

struct AsyncCopy {
  void* shared;
  const void* global;
  std::uint32_t bytes;
  std::uint32_t group;  // how many groups the thread committed before
};

struct AsyncCopies {
  std::vector<AsyncCopy> begun;
  std::size_t made = 0;      // of these, from the front
  std::uint32_t groups = 0;  // committed
};

// For the running thread. The bytes themselves are written by the kernel's own file, where the
// sanitizers see it.
void note_copy(void* shared, const void* global, std::uint32_t bytes, Where where);
void commit_copies();
// The oldest copy of all groups but the last `pending`, which the caller must make; false: none.
bool take_copy(std::uint32_t pending, AsyncCopy& copy);

}  // namespace tp::emulator
