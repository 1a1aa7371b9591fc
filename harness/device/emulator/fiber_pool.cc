#include "harness/device/emulator/fiber_pool.h"

namespace tp::emulator {
namespace {

constexpr std::size_t kThreadStack = (kAsan || kTsan ? 64 : 16) * 1024;

}  // namespace

FiberPool::FiberPool(void (*run)(void*)) : run_(run), stacks_(kThreadStack) {}

FiberPool::~FiberPool() { alive_ -= all_.size(); }

void FiberPool::make() {
  auto& fiber = *all_.emplace_back(std::make_unique<KernelFiber>());
  ++alive_;
  fiber.fiber.emplace(stacks_.take(), run_, &fiber);
  free_.reserve(all_.size());  // give() runs on a fiber and shall not allocate
  free_.push_back(&fiber);
}

void FiberPool::reserve(std::size_t count) {
  while (free_.size() < count) make();
}

KernelFiber& FiberPool::take() {
  reserve(1);
  KernelFiber* fiber = free_.back();
  free_.pop_back();
  return *fiber;
}

void FiberPool::give(KernelFiber& fiber) {
  if (!kTsan) free_.push_back(&fiber);
}

void FiberPool::drop(KernelFiber& fiber) {
  if (kTsan) return;
  const Stack stack = fiber.fiber->stack();
  open_up(stack.bottom, stack.bytes);
  fiber.fiber.emplace(stack, run_, &fiber);
  free_.push_back(&fiber);
}

void FiberPool::recycle() {
  if (!kTsan) return;
  for (const auto& fiber : all_) stacks_.give(fiber->fiber->stack());
  alive_ -= all_.size();
  all_.clear();
  free_.clear();
}

}  // namespace tp::emulator
