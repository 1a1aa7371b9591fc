#pragma once
// Runs cases in worker jobs outside of this process. A crash or a hang ends a job, not the night:
// the case in flight gets the blame, and the job is started again.

#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "harness/fuzz/job.h"
#include "harness/fuzz/runner.h"

namespace tp {

class Supervisor : public Runner {
 public:
  // Starts the jobs without waiting for them. Throws Unavailable if there is no mpirun.
  Supervisor(int jobs, int processes);

  std::string where() const override;
  bool has_room() const override;
  void submit(Request request) override;
  Answer wait() override;
  Runner& alone() override;

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
  void send(Slot& slot);
  void read(Slot& slot);
  void handle(Slot& slot, const std::string& line);
  void died(Slot& slot, Outcome outcome, const std::string& how);
  void poll_once();

  int processes_;
  std::vector<Slot> slots_;
  std::deque<Answer> answers_;
  std::unique_ptr<Supervisor> alone_;
};

// The processes of a job where none are asked for: the cores, at most 4. And the jobs that fill the
// cores.
int default_processes();
int default_jobs(int processes);

}  // namespace tp
