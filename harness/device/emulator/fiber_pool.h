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

// They stay suspended, ready to go on with another thread, and all streams share one pool.
// Under TSan every thread is somebody of its own, namely its fiber, so a fiber and its stack run
// one thread only before the launch is over, and each stream has a pool of its own: what one launch
// did happens before the next one anyway, so nobody sees that it is the same fiber again. (To make
// one costs TSan half a dozen system calls and page faults.)
class FiberPool {
 public:
  // `run` is what a fiber does; it must not return. Never destroyed: fibers are suspended in the
  // middle of a function.
  explicit FiberPool(void (*run)(void*));
  FiberPool(const FiberPool&) = delete;
  FiberPool& operator=(const FiberPool&) = delete;

  KernelFiber& take();
  // From the fiber itself, which may go on until it switches away.
  void give(KernelFiber& fiber);
  // Forgets what the fiber is doing. From the process's own stack.
  void drop(KernelFiber& fiber);

  // Makes sure that `count` calls of take() need nothing new: a kernel thread can neither throw
  // std::bad_alloc, nor may it be TSan's maker of a fiber, who knows whatever its maker knew.
  void reserve(std::size_t count);
  // TSan: all fibers may run again. None of their threads may be alive, and what they did must
  // happen before all that the pool is used for from now on: each thread released the pool itself,
  // as a clock, last.
  void recycle();
  // TSan: whether there may be `count` threads more. It cannot tell more than about 8000 apart,
  // those of ended blocks included.
  static bool has_room(std::size_t count) { return busy_ + count <= kMaxTsanFibers; }

 private:
  static constexpr std::size_t kMaxTsanFibers = 6000;

  void make();
  void forget_idle();
  static std::vector<FiberPool*>& pools();  // all there are

  void (*run_)(void*);
  StackPool stacks_;
  std::vector<std::unique_ptr<KernelFiber>> all_;
  std::vector<KernelFiber*> free_;
  static inline std::size_t alive_ = 0;  // of all pools
  static inline std::size_t busy_ = 0;   // TSan: of these, taken and not recycled
};

}  // namespace tp::emulator
