#pragma once
// Runs cases on the processes of this very job, where tpcheck itself was started by mpirun or srun:
// the same loop as under the supervisor, but a crash ends it all.

#include <deque>
#include <string>

#include "harness/fuzz/runner.h"

namespace tp {

class World;

// On every process: from now on one that dies of a signal prints the case it was running.
void name_crashes();

// On process 0. The others are in serve() (worker.h) meanwhile.
class InProcess : public Runner {
 public:
  // `place`: what take_place() said.
  InProcess(World& world, std::string place);
  ~InProcess() override;

  std::string where() const override;
  bool has_room() const override { return waiting_.empty(); }
  void submit(Request request) override { waiting_.push_back(std::move(request)); }
  Answer wait() override;
  Runner& alone() override { return *this; }

 private:
  World& world_;
  const std::string place_;
  std::deque<Request> waiting_;
};

}  // namespace tp
