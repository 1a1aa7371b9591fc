#pragma once
// Runs cases in worker jobs outside of this process. A crash or a hang ends a job, not the night:
// the case in flight gets the blame, and the job is started again.

#include <chrono>
#include <cstdint>
#include <deque>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "harness/fuzz/executor.h"
#include "harness/fuzz/job.h"
#include "harness/fuzz/runner.h"

namespace tp {

class Supervisor : public Runner {
 public:
  // Starts the jobs without waiting for them. Throws Unavailable if there is no mpirun.
  Supervisor(int jobs, int processes, Executor executor = this_executor());

  // Until a worker has said where it runs: where() knows it from then on.
  void wait_until_ready();

  std::string where() const override;
  bool has_room() const override;
  void submit(Request request) override;
  Answer wait() override;
  Supervisor& alone() override;

  // For whoever waits for several supervisors at once. Waits until any of their jobs has something
  // to say or is late, and sees to it.
  static void poll_once(std::initializer_list<Supervisor*> all);
  // An answer that has come, if there is one. Throws GaveUp once there is none and there will be
  // none.
  std::optional<Answer> take();
  int jobs() const { return int(slots_.size()); }

 private:
  using Clock = std::chrono::steady_clock;
  struct Slot {
    std::unique_ptr<Job> job;
    bool ready = false;             // has said so
    std::optional<Answer> current;  // what it runs, or will run once it is ready
    Clock::time_point give_up;      // when it is killed, unless it answers
    bool retires = false;           // its next verdict is its last
    int failed_starts = 0;          // in a row
  };

  void start(Slot& slot);
  void start_again(Slot& slot);
  void send(Slot& slot);
  void read(Slot& slot);
  void handle(Slot& slot, const std::string& line);
  void ready(Slot& slot, const std::string& greeting);
  void died(Slot& slot, Outcome outcome, const std::string& how);
  void late(Slot& slot);
  void give_up(const GaveUp& why);

  int processes_;
  Executor executor_;
  std::chrono::milliseconds start_limit_;
  std::optional<std::string> place_;  // what the first worker that was ready said of it
  std::vector<Slot> slots_;
  std::deque<Answer> answers_;
  std::optional<GaveUp> gave_up_;  // nothing is polled any more; what was answered still counts
  std::unique_ptr<Supervisor> alone_;
};

}  // namespace tp
