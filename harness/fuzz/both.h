#pragma once
// --on both: every case runs on the GPU and in the emulator, and the two answers become one. The
// same kernels give the same bits on either, so a difference is a finding by itself.

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "harness/base/verdict.h"
#include "harness/fuzz/supervisor.h"

namespace tp {

// The verdict that says what both sides saw, and which of them saw it. A finding of either side is
// one, whatever became of the other. Time on the GPU counts, and the longer wall time.
Verdict merged(const Verdict& gpu, const Verdict& emulator);

// Whose finding merged() tells of.
Side side_of(const Verdict& gpu, const Verdict& emulator);

class Both : public Runner {
 public:
  // Neither supervisor is used by anybody else meanwhile.
  Both(Supervisor& gpu, Supervisor& emulator);

  std::string where() const override;
  bool has_room() const override;
  void submit(Request request) override;
  Answer wait() override;
  Both& alone() override;

 private:
  // One executor, and what it is still to be given: the sides need not keep step.
  struct Side {
    Supervisor& runner;
    std::deque<Request> waiting = {};
  };
  struct Halves {
    std::optional<Answer> gpu, emulator;
  };

  void take(Side& side, std::optional<Answer> Halves::*half);
  std::optional<Answer> whole();
  std::optional<Answer> half_of_a_finding();

  Side gpu_, emulator_;
  std::map<std::uint64_t, Halves> open_;  // by the id of the request
  std::uint64_t next_id_ = 0;
  std::optional<GaveUp> gave_up_;  // one side did
  bool interrupted_ = false;       // Ctrl-C came: nothing is waited for any more
  std::unique_ptr<Both> alone_;
};

}  // namespace tp
