#include "harness/device/scheduler.h"

#include <cxxabi.h>
#include <fmt/format.h>

#include <cstring>
#include <exception>
#include <new>
#include <thread>
#include <utility>

#include "harness/base/check.h"
#include "harness/device/fiber.h"
#include "harness/device/sanitizer.h"

namespace tp {
namespace {

constexpr std::size_t kRankStack = (kAsan || kTsan ? 1024 : 256) * 1024;
constexpr std::uint64_t kStepsPerClock = 16;  // steps between two looks at the clock
constexpr std::uint64_t kSpinsPerIdle =
    256;  // steps of mere spinning between two questions to idle()
constexpr std::uint64_t kSpinsAwake = 100'000;  // then spinning leaves the core to others
constexpr int kPollsAwake = 64;

Scheduler* current_scheduler = nullptr;

// The C++ runtime keeps the exceptions in flight per OS thread; each rank needs its own.
struct ExceptionState {
  void* caught = nullptr;
  unsigned int uncaught = 0;

  void swap_with_thread() {
    ExceptionState mine = *this;
    void* globals = abi::__cxa_get_globals();
    std::memcpy(static_cast<void*>(this), globals, sizeof(*this));
    std::memcpy(globals, static_cast<void*>(&mine), sizeof(mine));
  }
};

StackPool& rank_stacks() {
  static StackPool pool(kRankStack);
  return pool;
}

}  // namespace

struct Scheduler::Rank {
  Scheduler& scheduler;
  const int tp_rank;
  const std::function<void(Stream&)> body;
  Stream& stream;
  Stream* waits_for = nullptr;  // the stream its synchronize() waits for
  bool finished = false;
  std::unique_ptr<Fiber> fiber;  // once it has begun
  Fiber home;                    // where its switches come from and go back to
  ExceptionState exceptions;

  Rank(Scheduler& scheduler, std::function<void(Stream&)> body, Stream& stream)
      : scheduler(scheduler), tp_rank(stream.tp_rank()), body(std::move(body)), stream(stream) {}

  bool runnable() const { return !finished && (waits_for == nullptr || waits_for->empty()); }
};

Scheduler::Scheduler(SchedulerOptions options) : options_(options), random_(options.seed) {
  TP_CHECK(current_scheduler == nullptr, "a process has one scheduler at a time");
  current_scheduler = this;
}

Scheduler::~Scheduler() {
  unwind();
  // What a device may still use is never used for anything else.
  if (settle(std::chrono::milliseconds(0))) {
    for (const auto& release : released_later_) release();
  }
  current_scheduler = nullptr;
}

Scheduler* Scheduler::current() { return current_scheduler; }

Stream& Scheduler::add_rank(int tp_rank, std::function<void(Stream&)> body) {
  Stream& stream = add_stream(tp_rank);
  ranks_.push_back(std::make_unique<Rank>(*this, std::move(body), stream));
  return stream;
}

Stream& Scheduler::add_stream(int tp_rank) {
  const std::uint64_t number = streams_.size();
  return *streams_.emplace_back(std::make_unique<Stream>(*this, tp_rank, number));
}

Report Scheduler::run(std::function<Idle()> idle) {
  try {
    for (std::uint64_t steps = 0; !report_.fault; ++steps) {
      if (is_complete()) break;
      if (options_.serial && device_is_busy()) {
        poll();
      } else if (!step()) {
        ask_idle(idle, false);
      } else {
        polls_ = 0;
        if (spins_ > 0 && spins_ % kSpinsPerIdle == 0) ask_idle(idle, true);
      }
      if (steps % kStepsPerClock == 0 && past_deadline()) hang("the deadline has passed");
    }
    // What a GPU fails at is complete, too, and nobody need have asked since.
    for (const auto& stream : streams_) {
      try {
        stream->queue_->check();
        if (options_.timed && !report_.fault) {
          const DeviceTime time = stream->queue_->time();
          report_.times[stream->tp_rank()].kernel_us += time.kernel_us;
          report_.times[stream->tp_rank()].collective_us += time.collective_us;
        }
      } catch (...) {
        fail_with_exception(*stream);
      }
    }
  } catch (...) {
    unwind();
    throw;
  }
  unwind();
  return report_;
}

bool Scheduler::step() {
  std::uint32_t runnable = 0;
  for (const auto& rank : ranks_) runnable += rank->runnable();
  for (const auto& stream : streams_) runnable += stream->runnable();
  if (runnable == 0) return false;
  std::uint32_t pick = random_.below(runnable);
  for (const auto& rank : ranks_) {
    if (rank->runnable() && pick-- == 0) return run_rank(*rank), true;
  }
  for (const auto& stream : streams_) {
    if (stream->runnable() && pick-- == 0) return step_stream(*stream), true;
  }
  TP_CHECK(false, "what was runnable is no longer");
}

void Scheduler::step_stream(Stream& stream) {
  note(stream.tp_rank(), stream.running());
  Progress progress = Progress::moved;
  try {
    progress = stream.step(random_);
  } catch (...) {
    fail_with_exception(stream);
  }
  spins_ = progress == Progress::spun ? spins_ + 1 : 0;
}

void Scheduler::fail_with_exception(const Stream& stream) {
  try {
    throw;
  } catch (Fault& fault) {
    if (fault.tp_rank < 0) fault.tp_rank = stream.tp_rank();
    fail(std::move(fault));
  } catch (const std::bad_alloc&) {
    fail({Outcome::OutOfMemory, "out of memory in " + std::string(stream.running()),
          stream.tp_rank()});
  }
}

void Scheduler::run_rank(Rank& rank) {
  note(rank.tp_rank, "host");
  spins_ = 0;
  rank.waits_for = nullptr;
  if (!rank.fiber) {
    const auto enter = [](void* rank) {
      Rank& self = *static_cast<Rank*>(rank);
      self.scheduler.rank_main(self);
    };
    rank.fiber = std::make_unique<Fiber>(rank_stacks().take(), enter, &rank);
  }
  current_rank_ = &rank;
  rank.exceptions.swap_with_thread();
  Fiber::switch_to(rank.home, *rank.fiber, Order::synchronised);
  rank.exceptions.swap_with_thread();
  current_rank_ = nullptr;
  if (rank.finished) {
    rank_stacks().give(rank.fiber->stack());
    rank.fiber.reset();
  }
}

void Scheduler::rank_main(Rank& rank) {
  const auto blame = [&](Outcome outcome, std::string what) {
    fail({outcome, std::move(what), rank.tp_rank});
  };
  try {
    rank.body(rank.stream);
  } catch (const Cancelled&) {
  } catch (Fault& fault) {
    if (fault.tp_rank < 0) fault.tp_rank = rank.tp_rank;
    fail(std::move(fault));
  } catch (const std::bad_alloc&) {
    blame(Outcome::OutOfMemory, "out of memory in host code");
  } catch (const std::exception& error) {
    blame(Outcome::BadLaunch, error.what());
  } catch (...) {
    blame(Outcome::BadLaunch, "host code threw something that is no std::exception");
  }
  rank.finished = true;
  Fiber::leave_for(*rank.fiber, rank.home, Order::synchronised);
}

void Scheduler::wait_until_empty(Stream& stream) {
  TP_CHECK(current_rank_ != nullptr, "only a rank's host code can synchronize");
  // Whoever unwinds goes on unwinding: what it would wait for may never come.
  if (std::uncaught_exceptions() > 0) return;
  if (cancelled_) throw Cancelled{};
  Rank& rank = *current_rank_;
  rank.waits_for = &stream;
  Fiber::switch_to(*rank.fiber, rank.home, Order::synchronised);
  if (cancelled_) throw Cancelled{};
  stream.device_queue().check();
  stream.device_queue().host_joins();
}

void Scheduler::fail(Fault fault) {
  if (!report_.fault) report_.fault = std::move(fault);
}

void Scheduler::unwind() {
  cancelled_ = true;
  // Kernels and calls go first: they may refer to what the ranks' stacks own.
  for (const auto& stream : streams_) {
    stream->operations_.clear();
    stream->kernels_.clear();
    stream->recording_ = nullptr;
    stream->queue_->abandon();
  }
  for (const auto& rank : ranks_) {
    if (rank->fiber) run_rank(*rank);
  }
  note(-1, "");
}

bool Scheduler::is_complete() {
  for (const auto& rank : ranks_) {
    if (!rank->finished) return false;
  }
  return streams_are_empty();
}

bool Scheduler::streams_are_empty() {
  for (const auto& stream : streams_) {
    if (!stream->empty()) return false;
  }
  return true;
}

bool Scheduler::device_is_busy() {
  for (const auto& stream : streams_) {
    if (!stream->queue_->finished()) return true;
  }
  return false;
}

void Scheduler::ask_idle(const std::function<Idle()>& idle, bool spinning) {
  note(-1, "");
  const Idle answer = idle ? idle() : Idle::stuck;
  if (spinning) {
    if (spins_ >= kSpinsAwake) std::this_thread::sleep_for(std::chrono::microseconds(50));
    return;
  }
  if (answer == Idle::moved) {
    polls_ = 0;
  } else if (answer == Idle::waiting || device_is_busy()) {
    poll();
  } else if (!step() && !is_complete()) {
    // Nor did a GPU, in this very moment, make anything runnable or complete the last of it.
    hang("nothing will ever go on");
  }
}

void Scheduler::poll() {
  if (past_deadline()) {
    hang("the deadline has passed");
  } else if (++polls_ < kPollsAwake) {
    std::this_thread::yield();
  } else {
    std::this_thread::sleep_for(std::chrono::microseconds(polls_ < 10 * kPollsAwake ? 20 : 200));
  }
}

bool Scheduler::settle(std::chrono::milliseconds patience) {
  const auto until = std::chrono::steady_clock::now() + patience;
  while (device_is_busy() && std::chrono::steady_clock::now() < until)
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  return !device_is_busy() && !device_is_lost();
}

bool Scheduler::past_deadline() const {
  return options_.deadline && std::chrono::steady_clock::now() >= *options_.deadline;
}

void Scheduler::hang(const std::string& why) {
  constexpr int kNamed = 4;
  std::string what = why;
  int waiting = 0;
  int first = -1;
  // Who runs comes first: whoever waits may well wait for it. And who waits for other ranks is the
  // last to blame.
  using At = DeviceQueue::At;
  bool of_others = true;
  for (const At at : {At::runs, At::waits, At::waits_for_others}) {
    for (const auto& stream : streams_) {
      if (stream->empty() || stream->at() != at) continue;
      if (at != At::waits_for_others) of_others = false;
      if (waiting == 0) first = stream->tp_rank();
      if (++waiting > kNamed) continue;
      const std::string who =
          stream->tp_rank() < 0 ? "the group" : fmt::format("rank {}", stream->tp_rank());
      what += fmt::format("{} {} {}", waiting == 1 ? ":" : ";", who, stream->describe());
    }
  }
  if (waiting > kNamed) what += fmt::format("; and {} more", waiting - kNamed);
  fail({Outcome::Hang, what, first, of_others});
}

void Scheduler::count(std::uint64_t blocks, std::uint64_t threads) {
  report_.blocks += blocks;
  report_.threads += threads;
}

void Scheduler::note(int tp_rank, std::string_view what) {
  if (options_.running != nullptr) options_.running->set(tp_rank, what);
}

}  // namespace tp
