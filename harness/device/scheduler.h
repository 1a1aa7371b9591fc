#pragma once
// Runs the ranks of one process: their host code as fibers, their streams, and the kernels in them,
// one thing at a time on one OS thread, in an order drawn from a seed. The same seed is the same
// order.

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "harness/device/fault.h"
#include "harness/device/random.h"
#include "harness/device/running.h"
#include "harness/device/stream.h"

namespace tp {

struct SchedulerOptions {
  std::uint64_t seed = 0;
  std::uint8_t poison = 0xFF;  // every byte of fresh shared memory; 0xFF: NaN in every format
  std::optional<std::chrono::steady_clock::time_point> deadline = {};
  RunningNow* running = nullptr;  // written at every switch, if given
  bool delays = false;  // seeded ones before kernels, so that a missing event or barrier shows
  bool serial = false;  // nothing is begun before the device has ended what it has
  bool timed = false;   // the device measures its kernels, where it can
};

// What a process that has nothing of its own to run finds out about the others.
enum class Idle : std::uint8_t {
  moved,    // something changed: look again
  waiting,  // not yet: ask again
  stuck,    // nothing will ever change
};

struct Report {
  std::optional<Fault> fault;
  std::uint64_t threads = 0;  // emulated CUDA threads started
  std::uint64_t blocks = 0;
  std::map<int, DeviceTime> times;  // of each rank, if it was timed and the device can tell
};

// At most one exists at a time. Made, run and destroyed on the process's own stack.
class Scheduler {
 public:
  explicit Scheduler(SchedulerOptions options);
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Adds a rank: `body` is its host code and gets the rank's stream, which is also returned. Host
  // code runs on a fiber's stack of 256 KiB: it must not call MPI; Stream::call can.
  Stream& add_rank(int tp_rank, std::function<void(Stream&)> body);
  // One more stream of a rank (-1: of all ranks together), also while running.
  Stream& add_stream(int tp_rank);

  // Runs until every body has returned and every stream is complete, or until a fault. Whatever
  // `body` throws becomes a fault: a Fault as it is, std::bad_alloc as OutOfMemory, any other
  // exception as BadLaunch. On a fault queued work is dropped (what a GPU has already goes on) and
  // every other rank that has begun is unwound, so that its destructors run. `idle` is asked when
  // nothing local can run, and now and then while kernels only spin; without it, that is stuck.
  // Stuck and a passed deadline are a Hang that names who waits for what. What `idle` finds out
  // takes real time, while kernels spin by steps: with several processes, the schedule of a kernel
  // that spins across a collective need not be the same again.
  Report run(std::function<Idle()> idle = {});

  // Ends the run with this fault (the first one counts). From `idle`, a call, or host code.
  void fail(Fault fault);

  // Lets the device come to rest after a fault. False: it did not, and is lost to this process.
  bool settle(std::chrono::milliseconds patience);

  const SchedulerOptions& options() const { return options_; }
  // The scheduler there is, or null.
  static Scheduler* current();

  // For Buffer: whether no stream has work, and memory to release once that is so.
  bool streams_are_empty();
  void release_later(std::function<void()> release) {
    released_later_.push_back(std::move(release));
  }

  // For Stream and the backends.
  void wait_until_empty(Stream& stream);
  void count(std::uint64_t blocks, std::uint64_t threads);
  bool cancelled() const { return cancelled_; }

 private:
  struct Rank;
  struct Cancelled {};

  bool step();  // runs one thing, picked at random; false: nothing is runnable
  void run_rank(Rank& rank);
  void rank_main(Rank& rank);
  void step_stream(Stream& stream);
  void fail_with_exception(const Stream& stream);  // from a catch block: with what was thrown
  void ask_idle(const std::function<Idle()>& idle, bool spinning);
  bool is_complete();  // every body has returned and every stream is empty
  bool device_is_busy();
  void poll();  // waits a little, the longer the more often it was called in a row
  bool past_deadline() const;
  void hang(const std::string& why);
  void unwind();
  void note(int tp_rank, std::string_view what);

  SchedulerOptions options_;
  Random random_;
  std::vector<std::unique_ptr<Rank>> ranks_;
  std::vector<std::unique_ptr<Stream>> streams_;
  std::vector<std::function<void()>> released_later_;
  Rank* current_rank_ = nullptr;  // whose host code runs just now
  bool cancelled_ = false;
  std::uint64_t spins_ = 0;  // steps since anything moved
  int polls_ = 0;            // times in a row that there was nothing to do but to wait
  Report report_;
};

}  // namespace tp
