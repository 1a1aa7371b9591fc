#include "harness/device/emulator/block.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <utility>

#include "harness/device/sanitizer.h"

namespace tp::emulator {
namespace {

// Where kernel threads come from and go back to: the process's own stack.
Fiber home;

}  // namespace

Thread* running = nullptr;

void Block::make_threads(const LaunchSize& size) {
  block_dim = {size.block[0], size.block[1], size.block[2]};
  threads_.assign(size.threads(), {});
  warps_.assign((threads_.size() + 31) / 32, {});
  copies_.assign(threads_.size(), {});
  yielded_.reserve(threads_.size());
  std::uint16_t index = 0;
  for (unsigned z = 0; z < block_dim.z; ++z) {
    for (unsigned y = 0; y < block_dim.y; ++y) {
      for (unsigned x = 0; x < block_dim.x; ++x, ++index) {
        threads_[index].block = this;
        threads_[index].thread_idx = {x, y, z};
        threads_[index].index = index;
      }
    }
  }
}

void Block::begin(const Launch& launch, std::uint64_t index, void* shared_memory,
                  std::uint8_t shared_poison, FiberPool& fibers, std::uint64_t seed) {
  const LaunchSize& size = launch.size;
  launch_ = &launch;
  fibers_ = &fibers;
  random_ = Random(seed);
  shared = shared_memory;
  poison = shared_poison;
  grid_dim = {size.grid[0], size.grid[1], size.grid[2]};
  block_idx = {unsigned(index % grid_dim.x), unsigned(index / grid_dim.x % grid_dim.y),
               unsigned(index / grid_dim.x / grid_dim.y)};
  const std::array<unsigned, 3> before = {block_dim.x, block_dim.y, block_dim.z};
  if (threads_.empty() || before != size.block) make_threads(size);
  for (Warp& warp : warps_) warp.exited = 0;
  alive_ = threads();
  any_copies_ = false;
  push_all();
  fibers.reserve(threads_.size());
  release(&begin_clock_);
}

Progress Block::run() {
  moved_ = false;
  if (!yielded_.empty()) {
    std::rotate(yielded_.begin(), yielded_.begin() + random_.below(std::uint32_t(yielded_.size())),
                yielded_.end());
    for (std::uint16_t index : yielded_) ready_.push_back(index);
    yielded_.clear();
  }
  Fiber::switch_to(home, next(), Order::unrelated);
  running = nullptr;
  if (fault_) throw Fault{Outcome::BadLaunch, fault_()};
  if (alive_ == 0) return Progress::done;
  if (yielded_.empty()) throw Fault{Outcome::BadLaunch, divergence()};
  return moved_ ? Progress::moved : Progress::spun;
}

void Block::drop() {
  for (int i = 0; i < threads(); ++i) {
    if (threads_[i].state != State::unstarted) fibers_->drop(*threads_[i].fiber);
  }
}

[[gnu::always_inline]] inline Fiber& Block::next() {
  if (ready_.empty()) return home;
  Thread& thread = threads_[ready_.pop_front()];
  if (thread.state == State::unstarted) {
    thread.state = State::ready;
    thread.fiber = &fibers_->take();
    thread.fiber->thread = &thread;
  }
  return *thread.fiber->fiber;
}

[[gnu::always_inline]] inline void Block::park(Thread& thread) {
  release(fibers_);  // in case it never runs again
  Fiber& self = *thread.fiber->fiber;
  Fiber& other = next();
  if (&other != &self) Fiber::switch_to(self, other, Order::unrelated);
  running = &thread;
  thread.state = State::ready;
}

void Block::forget_copies(Thread& thread) {
  AsyncCopies& copies = copies_[thread.index];
  if (!copies.begun.empty()) {
    fail(thread, [this, &thread, &copies] {
      return fmt::format(
          "{}: thread {} exits with {} asynchronous copies for which it did not wait", name(),
          thread.index, copies.begun.size());
    });
  }
  copies.groups = 0;
}

void Block::exit(Thread& thread) {
  if (any_copies_) forget_copies(thread);
  release(fibers_);
  thread.state = State::unstarted;
  thread.fenced = false;
  thread.waited = false;
  thread.loaded = nullptr;
  warps_[thread.index / 32].exited |= 1u << thread.index % 32;
  --alive_;
  moved_ = true;
}

void Block::run_threads(KernelFiber& fiber) {
  for (;;) {
    Block& block = static_cast<Block&>(*fiber.thread->block);
    for (;;) {
      running = fiber.thread;
      acquire(&block.begin_clock_);
      block.launch_->kernel->run_thread();
      block.exit(*fiber.thread);
      // A thread that nobody has begun needs no stack of its own: it can have this one, without a
      // switch.
      if (kTsan || block.ready_.empty()) break;
      Thread& after = block.threads_[block.ready_.front()];
      if (after.state != State::unstarted) break;
      block.ready_.pop_front();
      after.state = State::ready;
      after.fiber = &fiber;
      fiber.thread = &after;
    }
    block.fibers_->give(fiber);
    Fiber::switch_to(*fiber.fiber, block.next(), Order::unrelated);
  }
}

void run_kernel_threads(void* fiber) { Block::run_threads(*static_cast<KernelFiber*>(fiber)); }

void Block::push_lanes(int warp, std::uint32_t lanes, bool front) {
  // i -> a i + b is a permutation of the 32 lanes for every odd a.
  const auto draw = std::uint32_t(random_.next());
  const std::uint32_t a = draw | 1u;
  const std::uint32_t b = draw >> 16;
  for (std::uint32_t i = 0; i < 32; ++i) {
    const std::uint32_t lane = (a * i + b) & 31u;
    if ((lanes >> lane & 1u) == 0) continue;
    const auto index = std::uint16_t(warp * 32 + int(lane));
    front ? ready_.push_front(index) : ready_.push_back(index);
  }
}

std::uint32_t Block::lanes_of(int warp) const {
  const int lanes = threads() - warp * 32;
  return lanes >= 32 ? ~0u : (1u << lanes) - 1u;
}

void Block::push_all() {
  std::uint8_t order[kMaxThreads / 32];
  const auto warps = std::uint32_t(warps_.size());
  for (std::uint32_t i = 0; i < warps; ++i) {
    const std::uint32_t j = random_.below(i + 1);
    order[i] = order[j];
    order[j] = std::uint8_t(i);
  }
  for (std::uint32_t i = 0; i < warps; ++i) push_lanes(order[i], lanes_of(order[i]), false);
}

void Block::yield(Thread& thread) {
  yielded_.push_back(thread.index);
  park(thread);
}

void Block::barrier(Thread& thread, Where where) {
  std::uint64_t* clock = &barrier_clock_[barriers_ % 2];
  release(clock);
  thread.state = State::at_barrier;
  if (at_barrier_ == 0) barrier_line_ = where.line;
  barrier_differs_ |= barrier_line_ != where.line;
  if (++at_barrier_ == threads()) {
    if (barrier_differs_) fail(thread, [this] { return divergence(); });
    at_barrier_ = 0;
    ++barriers_;
    moved_ = true;
    push_all();
  }
  park(thread);
  acquire(clock);
}

std::uint64_t Block::meet(Thread& thread, const WarpOperation& operation, std::uint32_t mask,
                          std::uint64_t value, std::uint32_t parameter) {
  const int index = thread.index / 32;
  const std::uint32_t lane = thread.index % 32u;
  Warp& warp = warps_[std::size_t(index)];
  if ((mask >> lane & 1u) == 0) {
    fail(thread, [&] {
      return fmt::format(
          "warp collective divergence in {}, warp {}: lane {} is at {} ({}) with mask "
          "{:#010x}, which does not name it",
          name(), index, lane, operation.name, to_string(thread.where), mask);
    });
  }
  int m = 0;
  while (m < warp.open && warp.meetings[m].mask != mask) ++m;
  Meeting& meeting = warp.meetings[m];
  if (m == warp.open) {
    warp.parity ^= 1u << lane;
    meeting = {&operation, mask, 0, thread.where, &warp.clock[warp.parity >> lane & 1u][lane]};
    ++warp.open;
  }
  for (int i = 0; i < warp.open; ++i) {
    const Meeting& other = warp.meetings[i];
    const bool same = other.operation == &operation && other.where.line == thread.where.line;
    const bool wait_for_each_other = (other.mask >> lane & 1u) != 0 && (other.arrived & mask) != 0;
    if (other.mask == mask ? same : !wait_for_each_other) continue;
    fail(thread, [&] {
      return fmt::format(
          "warp collective divergence in {}, warp {}: lane {} is at {} ({}) with mask "
          "{:#010x}, others wait at {} ({}) with mask {:#010x}",
          name(), index, lane, operation.name, to_string(thread.where), mask, other.operation->name,
          to_string(other.where), other.mask);
    });
  }
  std::uint64_t* clock = meeting.clock;
  if (operation.orders_memory) release(clock);
  warp.value[lane] = value;
  warp.parameter[lane] = parameter;
  meeting.arrived |= 1u << lane;
  if (meeting.arrived == mask) {
    meeting = warp.meetings[--warp.open];
    moved_ = true;
    if (!operation.complete(warp.value, warp.parameter, mask)) {
      fail(thread, [&] {
        return fmt::format(
            "{} ({}) in {}, warp {}: a lane reads a lane that mask {:#010x} does not name",
            operation.name, to_string(thread.where), name(), index, mask);
      });
    }
    push_lanes(index, mask & ~(1u << lane), random_.next() & 1u);
  } else {
    thread.state = State::in_warp;
    park(thread);
  }
  if (operation.orders_memory) acquire(clock);
  return warp.value[lane];
}

void Block::fail(Thread& thread, std::function<std::string()> tell) {
  fault_ = std::move(tell);
  release(fibers_);
  Fiber::switch_to(*thread.fiber->fiber, home, Order::unrelated);
  __builtin_unreachable();
}

namespace {

const Block& block_of(const Thread& thread) { return static_cast<const Block&>(*thread.block); }
Block& block_of(Thread& thread) { return static_cast<Block&>(*thread.block); }

}  // namespace

const Launch& launch_of(const Thread& thread) { return block_of(thread).launch(); }

void block_barrier(Where where) {
  Thread& thread = *running;
  thread.what = "__syncthreads";
  thread.where = where;
  block_of(thread).barrier(thread, where);
}

void yield(const char* what, Where where) {
  Thread& thread = *running;
  thread.what = what;
  thread.where = where;
  block_of(thread).yield(thread);
}

void wait_for_previous(Where where) {
  const bool* ended = running->block->previous_ended;
  while (ended != nullptr && !*ended) yield("wait_for_previous_kernel", where);
  running->waited = true;
}

void let_next_start(Where) {
  if (!running->waited) *running->block->lets_next_start = true;
}

void misaligned(const void* address, std::size_t bytes, const char* what, Where where) {
  Thread& thread = *running;
  Block& block = block_of(thread);
  block.fail(thread, [&] {
    return fmt::format("{} ({}) in {}: the address is {} bytes past a multiple of {}", what,
                       to_string(where), block.name(),
                       reinterpret_cast<std::uintptr_t>(address) % bytes, bytes);
  });
}

std::uint64_t meet(const WarpOperation& operation, std::uint32_t mask, std::uint64_t value,
                   std::uint32_t parameter, Where where) {
  Thread& thread = *running;
  thread.what = operation.name;
  thread.where = where;
  return block_of(thread).meet(thread, operation, mask, value, parameter);
}

}  // namespace tp::emulator
