// What fences mean to TSan, which does not know them: a __threadfence makes the thread's later
// atomic and volatile stores releases, and its earlier loads acquires.

#include "harness/device/emulator/thread.h"
#include "harness/device/sanitizer.h"

namespace tp::emulator {

void fence() {
  if (!kTsan) return;
  running->fenced = true;
  if (running->loaded != nullptr) acquire(const_cast<void*>(running->loaded));
}

void before_store(void* address) {
  if (kTsan && running->fenced) release(address);
}

void after_load(const void* address) { running->loaded = address; }

}  // namespace tp::emulator
