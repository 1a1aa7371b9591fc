#include "harness/device/emulator/fiber_pool.h"

#include <utility>

namespace tp::emulator {
namespace {

constexpr std::size_t kThreadStack = (kAsan || kTsan ? 64 : 16) * 1024;

}  // namespace

std::vector<FiberPool*>& FiberPool::pools() {
  static auto& all = *new std::vector<FiberPool*>;
  return all;
}

FiberPool::FiberPool(void (*run)(void*)) : run_(run), stacks_(kThreadStack) {
  pools().push_back(this);
}

void FiberPool::make() {
  free_.reserve(all_.size() + 1);  // give() runs on a fiber and shall not allocate
  auto fiber = std::make_unique<KernelFiber>();
  fiber->fiber.emplace(stacks_.take(), run_, fiber.get());
  free_.push_back(fiber.get());
  all_.push_back(std::move(fiber));
  ++alive_;
}

void FiberPool::reserve(std::size_t count) {
  for (FiberPool* pool : pools()) {
    if (!kTsan || alive_ + count <= kMaxTsanFibers + free_.size()) break;
    if (pool != this) pool->forget_idle();
  }
  while (free_.size() < count) make();
}

KernelFiber& FiberPool::take() {
  KernelFiber* fiber = free_.back();
  free_.pop_back();
  if (kTsan) ++busy_;
  return *fiber;
}

void FiberPool::give(KernelFiber& fiber) {
  if (!kTsan) free_.push_back(&fiber);
}

void FiberPool::drop(KernelFiber& fiber) {
  const Stack stack = fiber.fiber->stack();
  open_up(stack.bottom, stack.bytes);
  fiber.fiber.emplace(stack, run_, &fiber);
  if (!kTsan) free_.push_back(&fiber);
}

void FiberPool::recycle() {
  if (!kTsan) return;
  busy_ -= all_.size() - free_.size();
  free_.clear();
  for (const auto& fiber : all_) free_.push_back(fiber.get());
}

void FiberPool::forget_idle() {
  for (KernelFiber* idle : free_) {
    stacks_.give(idle->fiber->stack());
    idle->fiber.reset();
  }
  alive_ -= free_.size();
  free_.clear();
  std::erase_if(all_, [](const auto& fiber) { return !fiber->fiber; });
  if (all_.empty()) stacks_.clear();  // mappings are few, too
}

}  // namespace tp::emulator
