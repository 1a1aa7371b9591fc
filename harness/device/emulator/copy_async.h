#pragma once
// Asynchronous copies of the emulator: noted when they begin, made by the thread's own wait.

#include <cstring>

#include "harness/device/copy_async.h"
#include "harness/device/emulator/async_copies.h"
#include "harness/device/emulator/thread.h"

namespace tp {

template <int Bytes>
inline void copy_async(void* shared, const void* global, Where where) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  emulator::note_copy(shared, global, Bytes, where);
  // From now on the data may arrive: who reads what was there before, or does not wait, shall see.
  std::memset(shared, emulator::running->block->poison, Bytes);
}
template <int Bytes>
inline void copy_async_or_zero(void* shared, const void* global, bool wanted, Where where) {
  static_assert(Bytes == 16);
  alignas(16) static constexpr unsigned char kZeros[16] = {};
  copy_async<Bytes>(shared, wanted ? global : kZeros, where);
}
inline void copy_async_commit() { emulator::commit_copies(); }
template <int Pending>
inline void copy_async_wait() {
  emulator::AsyncCopy copy;
  while (emulator::take_copy(Pending, copy)) {
    if (copy.bytes == 16) {
      std::memcpy(copy.shared, copy.global, 16);
    } else if (copy.bytes == 8) {
      std::memcpy(copy.shared, copy.global, 8);
    } else {
      std::memcpy(copy.shared, copy.global, 4);
    }
  }
}

}  // namespace tp
