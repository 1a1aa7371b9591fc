// A __threadfence lets what the block has stored in other ranks' memory arrive. And what it means
// to TSan, which does not know fences: the thread's later atomic and volatile stores are releases,
// and its earlier loads acquires.

#include "harness/device/emulator/peer_stores.h"
#include "harness/device/emulator/thread.h"
#include "harness/device/sanitizer.h"

namespace tp::emulator {

void fence() {
  deliver_all(*running->block);
  if (!kTsan) return;
  running->fenced = true;
  if (running->loaded != nullptr) acquire(const_cast<void*>(running->loaded));
}

void before_store(void* address) {
  if (kTsan && running->fenced) release(address);
}

void after_load(const void* address) { running->loaded = address; }

}  // namespace tp::emulator
