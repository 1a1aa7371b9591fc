#include "harness/device/emulator/async_copies.h"

#include <fmt/format.h>

#include <cstddef>
#include <new>
#include <string>

#include "harness/device/emulator/block.h"

namespace tp::emulator {
namespace {

Block& block() { return static_cast<Block&>(*running->block); }
AsyncCopies& own() { return block().copies(*running); }

}  // namespace

void note_copy(void* shared, const void* global, std::uint32_t bytes, Where where) {
  for (const void* address : {static_cast<const void*>(shared), global}) {
    if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) {
      misaligned(address, bytes, "copy_async", where);
    }
  }
  const auto* first = static_cast<const std::byte*>(block().shared);
  const auto* to = static_cast<const std::byte*>(shared);
  if (to < first || to + bytes > first + block().shared_bytes()) {
    Block& self = block();
    self.fail(*running, [where, &self] {
      return fmt::format("copy_async ({}) in {}: the destination is not in its shared memory",
                         to_string(where), self.name());
    });
  }
  AsyncCopies& copies = own();
  bool noted = true;
  try {
    copies.begun.push_back({shared, global, bytes, copies.groups});
  } catch (const std::bad_alloc&) {
    noted = false;
  }
  // Thrown again where somebody can catch it: not on a kernel thread's stack.
  if (!noted) block().fail(*running, []() -> std::string { throw std::bad_alloc(); });
}

void commit_copies() { ++own().groups; }

bool take_copy(std::uint32_t pending, AsyncCopy& copy) {
  AsyncCopies& copies = own();
  if (copies.made < copies.begun.size()) {
    copy = copies.begun[copies.made];
    if (copy.group + pending < copies.groups) {
      ++copies.made;
      return true;
    }
  }
  copies.begun.erase(copies.begun.begin(), copies.begun.begin() + std::ptrdiff_t(copies.made));
  copies.made = 0;
  return false;
}

}  // namespace tp::emulator
