#include "harness/device/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

namespace tp {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kStacksPerSlab = 32;
// Tops at equal alignment fall into the same few sets of the L1 cache; these are spread over a
// page.
constexpr std::size_t kStagger = 3 * 64;
constexpr std::size_t kStaggers = 16;

}  // namespace

StackPool::StackPool(std::size_t stack_bytes)
    : stack_bytes_((stack_bytes + kStagger * kStaggers + kPage - 1) / kPage * kPage) {}

void StackPool::clear() {
  for (std::byte* slab : slabs_) munmap(slab, kStacksPerSlab * (stack_bytes_ + kPage));
  slabs_.clear();
  free_.clear();
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

void Fiber::enter(boost::context::detail::transfer_t transfer) noexcept {
  const Jump jump = *static_cast<Jump*>(transfer.data);
  arrive(*jump.to, *jump.from, transfer.fctx);
  jump.to->entry_(jump.to->argument_);
  __builtin_unreachable();
}

void Fiber::leave_for(Fiber& from, Fiber& to, Order order) {
  jump(from, to, order, nullptr);
  __builtin_unreachable();
}

Fiber::Fiber(Stack stack, void (*entry)(void*), void* argument)
    : context_(
          boost::context::detail::make_fcontext(stack.bottom + stack.bytes, stack.bytes, enter)),
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

}  // namespace tp
