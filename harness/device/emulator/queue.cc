#include "harness/device/emulator/queue.h"

#include "harness/device/emulator/block.h"
#include "harness/device/sanitizer.h"

namespace tp {

std::unique_ptr<DeviceQueue> make_device_queue(int) { return std::make_unique<emulator::Queue>(); }

namespace emulator {
namespace {

// TSan: pools of streams that are no more, whose work happened before all that is to come.
[[maybe_unused]] std::vector<FiberPool*>& spare_pools() {
  static auto& pools = *new std::vector<FiberPool*>;
  return pools;
}

}  // namespace

Queue::Queue() {
#if TP_TSAN
  identity_ = __tsan_create_fiber(0);
  if (spare_pools().empty()) spare_pools().push_back(new FiberPool(run_kernel_threads));
  own_fibers_ = spare_pools().back();
  spare_pools().pop_back();
#endif
}

Queue::~Queue() {
#if TP_TSAN
  spare_pools().push_back(own_fibers_);
  __tsan_destroy_fiber(identity_);
#endif
}

FiberPool& Queue::fibers() {
  static FiberPool& shared = *new FiberPool(run_kernel_threads);
  return own_fibers_ != nullptr ? *own_fibers_ : shared;
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
