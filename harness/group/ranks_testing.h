#pragma once
// Tests of a group: its ranks on the processes that the test was started with.

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "harness/device/scheduler.h"
#include "harness/group/mpi_testing.h"
#include "harness/group/tp_group.h"

namespace tp {

using Clock = std::chrono::steady_clock;

struct Outcomes {
  std::optional<Fault> fault;
  bool broken = false;
  bool only_waits = false;
};

// Runs `body` as every rank of a group of tp_size.
inline Outcomes run_ranks(int tp_size, std::uint64_t seed,
                          const std::function<void(TpGroup&, Stream&)>& body,
                          std::chrono::milliseconds patience = std::chrono::seconds(20),
                          bool delays = false,
                          const std::function<void(const std::string&)>& trace = {},
                          bool serial = false) {
  const auto deadline = Clock::now() + patience;
  GroupSession session(test_world(), tp_size, deadline, trace);
  Scheduler scheduler({.seed = seed, .deadline = deadline, .delays = delays, .serial = serial});
  for (std::int64_t r = session.local_ranks().offset; r < session.local_ranks().end(); ++r) {
    scheduler.add_rank(int(r), [&, r](Stream& stream) {
      TpGroup group = session.group(int(r));
      body(group, stream);
      session.end_rank(int(r), stream);
    });
  }
  const Report report = scheduler.run([&] { return session.progress(); });
  Outcomes outcomes{report.fault, false, report.fault && report.fault->of_others};
  if (auto fault = session.finish(report.fault)) outcomes.fault = fault;
  outcomes.broken = session.broken();
  return outcomes;
}

// What went wrong, as one text: a test that fails on one process must not leave the others in the
// next run.
inline std::string text_of(const Outcomes& result) {
  return result.fault ? std::string(name_of(result.fault->outcome)) + ": " + result.fault->what
                      : "no fault";
}
inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace tp
