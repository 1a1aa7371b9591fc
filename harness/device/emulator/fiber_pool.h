#pragma once
// The fibers that kernel threads run on. One fiber runs many threads, one after another.

#include <cstddef>
#include <memory>
#include <optional>
#include <vector>

#include "harness/device/fiber.h"
#include "harness/device/sanitizer.h"

namespace tp::emulator {

struct Thread;
class FiberPool;

struct KernelFiber {
  std::optional<Fiber> fiber;
  Thread* thread = nullptr;  // what it runs, or shall run when it is switched to
};

// Under TSan every thread is somebody of its own, so a fiber runs one thread only, and its stack is
// not used again before the launch is over: TSan would mix up the two threads' locals. So each
// stream has a pool then; otherwise all share one, whose fibers stay suspended, ready to go on with
// another thread.
class FiberPool {
 public:
  // `run` is what a fiber does; it must not return.
  explicit FiberPool(void (*run)(void*));
  ~FiberPool();

  KernelFiber& take();
  // From the fiber itself, which may go on until it switches away.
  void give(KernelFiber& fiber);
  // Forgets what the fiber is doing. From the process's own stack.
  void drop(KernelFiber& fiber);

  // TSan: makes sure that `count` calls of take() need nothing new. A fiber inherits what its maker
  // knows, so a kernel thread must not be the maker.
  void reserve(std::size_t count);
  // TSan: forgets all fibers. None of their threads may be alive, and whoever calls this must have
  // acquired the pool itself as a clock: each thread released it last.
  void recycle();
  // TSan cannot tell more than about 8000 fibers apart.
  static std::size_t alive() { return alive_; }

 private:
  void make();

  void (*run_)(void*);
  StackPool stacks_;
  std::vector<std::unique_ptr<KernelFiber>> all_;
  std::vector<KernelFiber*> free_;
  static inline std::size_t alive_ = 0;
};

}  // namespace tp::emulator
