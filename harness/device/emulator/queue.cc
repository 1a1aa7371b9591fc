#include "harness/device/emulator/queue.h"

#include "harness/device/emulator/block.h"
#include "harness/device/sanitizer.h"

namespace tp {

std::unique_ptr<DeviceQueue> make_device_queue(int) { return std::make_unique<emulator::Queue>(); }

namespace emulator {

Queue::Queue() {
#if TP_TSAN
  identity_ = __tsan_create_fiber(0);
  own_fibers_.emplace(run_kernel_threads);
#endif
}

Queue::~Queue() {
#if TP_TSAN
  {
    AsStream as_stream(*this);
    own_fibers_.reset();
  }
  __tsan_destroy_fiber(identity_);
#endif
}

FiberPool& Queue::fibers() {
  // Never destroyed: its fibers are suspended in the middle of a function.
  static FiberPool& shared = *new FiberPool(run_kernel_threads);
  return own_fibers_ ? *own_fibers_ : shared;
}

void Queue::host_joins() {
  if (!kTsan) return;
  {
    AsStream as_stream(*this);
    release(&clock_);
  }
  acquire(&clock_);
}

void Queue::host_leaves() {
  if (!kTsan) return;
  release(&clock_);
  AsStream as_stream(*this);
  acquire(&clock_);
}

Queue::AsStream::AsStream([[maybe_unused]] Queue& queue) {
#if TP_TSAN
  before_ = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(queue.identity_, 1);
  overlooked_.emplace();
#endif
}

Queue::AsStream::~AsStream() {
#if TP_TSAN
  overlooked_.reset();
  __tsan_switch_to_fiber(before_, 1);
#endif
}

}  // namespace emulator
}  // namespace tp
