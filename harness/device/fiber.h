#pragma once
// Stacks to switch between: Boost.Context's jumps, told to ASan and TSan by hand.

#include <boost/context/detail/fcontext.hpp>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "harness/device/sanitizer.h"

namespace tp {

struct Stack {
  std::byte* bottom = nullptr;
  std::size_t bytes = 0;  // the top is bottom + bytes
};

// Stacks of one size, each with a guard page below it: an overflow is a crash, never silent.
class StackPool {
 public:
  explicit StackPool(std::size_t stack_bytes);
  ~StackPool() { clear(); }
  StackPool(const StackPool&) = delete;
  StackPool& operator=(const StackPool&) = delete;

  Stack take();            // the one that was given back last: it is still in the cache
  void give(Stack stack);  // throws away whatever is on it
  void reserve(std::size_t count);
  void clear();  // unmaps all of them; none may be in use

 private:
  void grow();

  std::size_t stack_bytes_;
  std::vector<Stack> free_;
  std::vector<std::byte*> slabs_;
  std::size_t made_ = 0;
};

// Whether what one thread of execution did before a switch happens before what the other does after
// it. Only TSan can see the difference.
enum class Order : bool { synchronised, unrelated };

class Fiber {
 public:
  // The stack that runs just now; it is left by the first switch_to from it.
  Fiber() = default;
  // Will run entry(argument), which must not return, at the first switch to it.
  Fiber(Stack stack, void (*entry)(void*), void* argument);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  Stack stack() const { return stack_; }
  // Leaves `from`, which must be what runs just now, and goes on with `to`.
  static void switch_to(Fiber& from, Fiber& to, Order order);
  // The same for the last time: nobody may switch to `from` again.
  [[noreturn]] static void leave_for(Fiber& from, Fiber& to, Order order);

 private:
  // What a jump tells the fiber it lands in.
  struct Jump {
    Fiber* from;
    Fiber* to;
  };
  static void enter(boost::context::detail::transfer_t transfer) noexcept;
  // `fake_stack`: where ASan puts what it keeps for `from`; null for the last time.
  static void jump(Fiber& from, Fiber& to, Order order, void** fake_stack);
  static void arrive(Fiber& self, Fiber& from, void* context);

  void* context_ = nullptr;
  Stack stack_;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  [[maybe_unused]] void* fake_stack_ = nullptr;  // ASan's
  [[maybe_unused]] void* identity_ = nullptr;    // TSan's
};

[[gnu::always_inline]] inline void Fiber::arrive([[maybe_unused]] Fiber& self, Fiber& from,
                                                 void* context) {
  from.context_ = context;
#if TP_ASAN
  const void* bottom = nullptr;
  std::size_t bytes = 0;
  __sanitizer_finish_switch_fiber(self.fake_stack_, &bottom, &bytes);
  if (from.entry_ == nullptr) {  // the process's own stack: only ASan knows where it is
    from.stack_ = {const_cast<std::byte*>(static_cast<const std::byte*>(bottom)), bytes};
  }
#endif
}

// Inline, and so is what calls it: the processor foresees no return on a stack that was switched
// to, so each function on the way costs more than the switch.
[[gnu::always_inline]] inline void Fiber::switch_to(Fiber& from, Fiber& to, Order order) {
  jump(from, to, order, &from.fake_stack_);
}

[[gnu::always_inline]] inline void Fiber::jump(Fiber& from, Fiber& to, [[maybe_unused]] Order order,
                                               [[maybe_unused]] void** fake_stack) {
#if TP_ASAN
  __sanitizer_start_switch_fiber(fake_stack, to.stack_.bottom, to.stack_.bytes);
#endif
#if TP_TSAN
  if (from.identity_ == nullptr) from.identity_ = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to.identity_, order == Order::unrelated ? 1 : 0);
#endif
  Jump jump{&from, &to};
  const auto transfer = boost::context::detail::jump_fcontext(to.context_, &jump);
  arrive(from, *static_cast<Jump*>(transfer.data)->from, transfer.fctx);
}

}  // namespace tp
