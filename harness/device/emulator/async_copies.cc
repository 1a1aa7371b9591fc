#include "harness/device/emulator/async_copies.h"

#include <new>
#include <string>

#include "harness/device/emulator/block.h"

namespace tp::emulator {
namespace {

AsyncCopies& own() {
  Thread& thread = *running;
  return static_cast<Block&>(*thread.block).copies(thread);
}

}  // namespace

void note_copy(void* shared, const void* global, std::uint32_t bytes, Where where) {
  for (const void* address : {static_cast<const void*>(shared), global}) {
    if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) {
      misaligned(address, bytes, "copy_async", where);
    }
  }
  AsyncCopies& copies = own();
  try {
    copies.begun.push_back({shared, global, bytes, copies.groups});
  } catch (const std::bad_alloc&) {  // to where it can be caught
    static_cast<Block&>(*running->block).fail(*running, []() -> std::string {
      throw std::bad_alloc();
    });
  }
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
