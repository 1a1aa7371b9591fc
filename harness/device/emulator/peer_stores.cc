#include "harness/device/emulator/peer_stores.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "harness/device/emulator/block.h"
#include "harness/device/emulator/thread.h"
#include "harness/device/sanitizer.h"

namespace tp::emulator {

namespace {

struct Late {
  void* address;
  std::uint64_t word;
  std::size_t bytes;
  const Thread* thread;
  const BlockInfo* block;
  const Launch* launch;
};

std::vector<Late>& on_the_way() {
  static auto& all = *new std::vector<Late>;
  return all;
}

template <typename T>
void write(const Late& late) {
  T word;
  std::memcpy(&word, &late.word, sizeof(T));
  __atomic_store(static_cast<T*>(late.address), &word, __ATOMIC_RELAXED);
}

void deliver(const Late& late) {
  switch (late.bytes) {
    case 1:
      return write<std::uint8_t>(late);
    case 2:
      return write<std::uint16_t>(late);
    case 4:
      return write<std::uint32_t>(late);
    default:
      return write<std::uint64_t>(late);
  }
}

// Those of which `is_one` says so, in their order.
template <typename F>
void deliver_if(F is_one) {
  std::erase_if(on_the_way(), [&](const Late& late) {
    if (!is_one(late)) return false;
    deliver(late);
    return true;
  });
}

}  // namespace

void store_late(void* address, const void* word, std::size_t bytes) {
  const Overlooked overlooked;
  deliver_if([&](const Late& l) { return l.address == address && l.thread == running; });
  Late late{address, 0, bytes, running, running->block, &launch_of(*running)};
  std::memcpy(&late.word, word, bytes);
  on_the_way().push_back(late);
}

void deliver_some(Random& random) {
  std::vector<Late>& late = on_the_way();
  if (late.empty()) return;
  for (std::size_t left = random.below(std::uint32_t(late.size() + 3) / 4 + 1); left > 0; --left) {
    Late& one = late[random.below(std::uint32_t(late.size()))];
    deliver(one);
    one = late.back();
    late.pop_back();
  }
}

void deliver_all(const BlockInfo& block) {
  if (!on_the_way().empty()) deliver_if([&](const Late& l) { return l.block == &block; });
}
void deliver_all(const Launch& launch) {
  if (!on_the_way().empty()) deliver_if([&](const Late& l) { return l.launch == &launch; });
}
void lose_all(const Launch& launch) {
  std::erase_if(on_the_way(), [&](const Late& l) { return l.launch == &launch; });
}

}  // namespace tp::emulator
