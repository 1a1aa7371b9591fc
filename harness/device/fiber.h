#pragma once
// Stacks to switch between: Boost.Context's jumps, told to ASan and TSan by hand.

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tp {

struct Stack {
  std::byte* bottom = nullptr;
  std::size_t bytes = 0;  // the top is bottom + bytes
};

// Stacks of one size, each with a guard page below it: an overflow is a crash, never silent.
class StackPool {
 public:
  explicit StackPool(std::size_t stack_bytes);
  ~StackPool();
  StackPool(const StackPool&) = delete;
  StackPool& operator=(const StackPool&) = delete;

  Stack take();            // the one that was given back last: it is still in the cache
  void give(Stack stack);  // throws away whatever is on it
  void reserve(std::size_t count);

 private:
  void grow();

  std::size_t stack_bytes_;
  std::vector<Stack> free_;
  std::vector<std::byte*> slabs_;
  std::size_t made_ = 0;
};

// Whether what one thread of execution did before a switch happens before what the other does after it.
// Only TSan can see the difference.
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
  // Fetches what a switch to it will touch.
  void prefetch() const {
    for (int line = 0; line < 4; ++line) {
      __builtin_prefetch(static_cast<const std::byte*>(context_) + 64 * line);
    }
  }
  // Leaves `from`, which must be what runs just now, and goes on with `to`.
  static void switch_to(Fiber& from, Fiber& to, Order order);

 private:
  struct Jump;
  friend struct Entry;
  static void arrive(Fiber& self, Fiber& from, void* context);

  void* context_ = nullptr;
  Stack stack_;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  [[maybe_unused]] void* fake_stack_ = nullptr;  // ASan's
  [[maybe_unused]] void* identity_ = nullptr;    // TSan's
};

}  // namespace tp
