#include "harness/device/fiber.h"

#include <sys/mman.h>

#include <boost/context/detail/fcontext.hpp>
#include <cstdint>
#include <new>

#include "harness/device/sanitizer.h"

namespace tp {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kStacksPerSlab = 32;
// Tops at equal alignment fall into the same few sets of the L1 cache; these are spread over a page.
constexpr std::size_t kStagger = 3 * 64;
constexpr std::size_t kStaggers = 16;

}  // namespace

StackPool::StackPool(std::size_t stack_bytes)
    : stack_bytes_((stack_bytes + kStagger * kStaggers + kPage - 1) / kPage * kPage) {}

StackPool::~StackPool() {
  for (std::byte* slab : slabs_) munmap(slab, kStacksPerSlab * (stack_bytes_ + kPage));
}

void StackPool::grow() {
  const std::size_t pitch = stack_bytes_ + kPage;
  void* memory = mmap(nullptr, kStacksPerSlab * pitch, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  slabs_.push_back(static_cast<std::byte*>(memory));
  free_.reserve(slabs_.size() * kStacksPerSlab);  // give() never allocates
  for (std::size_t i = 0; i < kStacksPerSlab; ++i, ++made_) {
    std::byte* guard = slabs_.back() + i * pitch;
    if (mprotect(guard, kPage, PROT_NONE) != 0) throw std::bad_alloc();
    free_.push_back({guard + kPage, stack_bytes_ - made_ % kStaggers * kStagger});
  }
}

void StackPool::reserve(std::size_t count) {
  while (free_.size() < count) grow();
}

Stack StackPool::take() {
  reserve(1);
  const Stack stack = free_.back();
  free_.pop_back();
  return stack;
}

void StackPool::give(Stack stack) {
  open_up(stack.bottom, stack.bytes);
  free_.push_back(stack);
}

// What a jump tells the fiber it lands in.
struct Fiber::Jump {
  Fiber* from;
  Fiber* to;
};

struct Entry {
  static void run(boost::context::detail::transfer_t transfer) noexcept {
    const Fiber::Jump jump = *static_cast<Fiber::Jump*>(transfer.data);
    Fiber::arrive(*jump.to, *jump.from, transfer.fctx);
    jump.to->entry_(jump.to->argument_);
    __builtin_unreachable();
  }
};

Fiber::Fiber(Stack stack, void (*entry)(void*), void* argument)
    : context_(boost::context::detail::make_fcontext(stack.bottom + stack.bytes, stack.bytes, Entry::run)),
      stack_(stack),
      entry_(entry),
      argument_(argument) {
#if TP_TSAN
  identity_ = __tsan_create_fiber(0);
#endif
}

Fiber::~Fiber() {
#if TP_TSAN
  if (entry_ != nullptr) __tsan_destroy_fiber(identity_);
#endif
}

void Fiber::arrive([[maybe_unused]] Fiber& self, Fiber& from, void* context) {
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

void Fiber::switch_to(Fiber& from, Fiber& to, [[maybe_unused]] Order order) {
#if TP_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack_, to.stack_.bottom, to.stack_.bytes);
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
