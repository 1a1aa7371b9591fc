// Supervisor and worker jobs, with the canary as the operator. This executable is its own worker,
// and so has a main of its own.

#include "harness/fuzz/supervisor.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstring>

#include "harness/base/operator.h"
#include "harness/fuzz/canary_testing.h"
#include "harness/fuzz/worker.h"
#include "harness/group/world.h"

namespace tp {
namespace {

using std::chrono::milliseconds;

Request canary(const std::string& fault, int fault_rank = 0,
               milliseconds deadline = milliseconds(30000)) {
  const std::string line = fmt::format(
      "v1 canary num_heads=8 num_kv_heads=2 head_dim=8 tp_size=8 num_tokens=1 dtype=bf16 seed=7 "
      "fault={} fault_rank={}",
      fault, fault_rank);
  return {.line = line, .mutant = "", .deadline = deadline, .trace = false};
}

bool mentions(const std::string& text, const std::string& word) {
  return text.find(word) != std::string::npos;
}

// Whether the runner still runs cases, and rightly.
void expect_alive(Runner& runner) {
  EXPECT_EQ(runner.run(canary("none")).verdict.outcome, Outcome::Pass);
  EXPECT_EQ(runner.run(canary("wrong")).verdict.outcome, Outcome::WrongValue);
}

class SupervisorTest : public testing::TestWithParam<int> {};

TEST_P(SupervisorTest, AnswersBelongToTheirRequests) {
  Supervisor runner(2, GetParam());
  int in_flight = 0, wrong = 0;
  for (int i = 0; i < 200 || in_flight > 0;) {
    while (i < 200 && runner.has_room()) {
      runner.submit(canary(i % 3 == 0 ? "wrong" : "none"));
      ++i;
      ++in_flight;
    }
    const Answer answer = runner.wait();
    --in_flight;
    const bool expected = mentions(answer.request.line, "fault=wrong");
    EXPECT_EQ(answer.verdict.finding(), expected) << answer.request.line;
    wrong += expected;
  }
  EXPECT_EQ(wrong, 67);
}

TEST_P(SupervisorTest, DeathsAreBlamedOnCaseAndRankAndTheJobGoesOn) {
  Supervisor runner(1, GetParam());
  const struct {
    const char* fault;
    const char* how;
  } deaths[] = {{"segv", "SIGSEGV"}, {"abort", "SIGABRT"}, {"exit", "exited with 3"}};
  for (const auto& [fault, how] : deaths) {
    for (const int rank : {1, 6}) {
      const Answer answer = runner.run(canary(fault, rank));
      EXPECT_EQ(answer.verdict.outcome, Outcome::Crash) << fault;
      EXPECT_TRUE(mentions(answer.request.line, fault));
      EXPECT_TRUE(mentions(answer.verdict.detail, how)) << answer.verdict.detail;
      EXPECT_TRUE(mentions(answer.verdict.detail, fmt::format("tp_rank {}", rank)))
          << answer.verdict.detail;
    }
    expect_alive(runner);
  }
}

TEST_P(SupervisorTest, AnEndlessLoopIsAHangInItsDeadline) {
  Supervisor runner(1, GetParam());
  runner.run(canary("none"));
  const auto start = std::chrono::steady_clock::now();
  const Answer answer = runner.run(canary("loop", 5, milliseconds(500)));
  EXPECT_EQ(answer.verdict.outcome, Outcome::Hang);
  EXPECT_TRUE(mentions(answer.verdict.detail, "tp_rank 5")) << answer.verdict.detail;
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));
  expect_alive(runner);
}

TEST_P(SupervisorTest, WhatACasePrintsDoesNotTouchItsVerdict) {
  Supervisor runner(1, GetParam());
  for (const int rank : {0, 5}) {
    EXPECT_EQ(runner.run(canary("noise", rank, milliseconds(3000))).verdict.outcome, Outcome::Pass);
  }
  expect_alive(runner);
}

TEST_P(SupervisorTest, OutputWithoutEndIsAHangInItsDeadline) {
  Supervisor runner(1, GetParam());
  runner.run(canary("none"));
  const auto start = std::chrono::steady_clock::now();
  const Answer answer = runner.run(canary("endless", 5, milliseconds(500)));
  EXPECT_EQ(answer.verdict.outcome, Outcome::Hang);
  EXPECT_LT(answer.log.size(), 100'000u);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));
  expect_alive(runner);
}

TEST_P(SupervisorTest, ASkippedCollectiveIsAMismatchAndNotAHang) {
  Supervisor runner(1, GetParam());
  const Answer answer = runner.run(canary("skip_collective", 3));
  EXPECT_EQ(answer.verdict.outcome, Outcome::CollectiveMismatch) << answer.verdict.detail;
  EXPECT_TRUE(mentions(answer.verdict.detail, "tp_rank 3")) << answer.verdict.detail;
  expect_alive(runner);
}

TEST_P(SupervisorTest, ARankThatThrowsIsAFinding) {
  Supervisor runner(1, GetParam());
  const Answer answer = runner.run(canary("throw", 3));
  EXPECT_TRUE(answer.verdict.finding());
  EXPECT_TRUE(mentions(answer.verdict.detail, "a canary threw this")) << answer.verdict.detail;
  expect_alive(runner);
}

TEST_P(SupervisorTest, ItSaysWhereItsWorkersAre) {
  Supervisor runner(1, GetParam());
  runner.wait_until_ready();
  EXPECT_TRUE(runner.where().starts_with(executor_name())) << runner.where();
  EXPECT_TRUE(mentions(runner.where(), fmt::format(", 1 job of {} process", GetParam())))
      << runner.where();
  expect_alive(runner);
}

TEST_P(SupervisorTest, LinesThatCannotBeMeantAreRefused) {
  Supervisor runner(1, GetParam());
  for (const char* line :
       {"", "v1", "v1 nobody", "v2 canary", "v1 canary tp_size=0", "v1 canary num_heads=48"}) {
    Request request = canary("none");
    request.line = line;
    EXPECT_EQ(runner.run(request).verdict.outcome, Outcome::Refused) << line;
  }
  Request unknown = canary("none");
  unknown.mutant = "9:nothing";
  EXPECT_EQ(runner.run(unknown).verdict.outcome, Outcome::Refused);
  expect_alive(runner);
}

TEST_P(SupervisorTest, TraceComesOnlyWhenAskedFor) {
  Supervisor runner(1, GetParam());
  EXPECT_TRUE(runner.run(canary("none")).trace.empty());
  Request request = canary("none");
  request.trace = true;
  EXPECT_FALSE(runner.run(request).trace.empty());
}

TEST_P(SupervisorTest, MutantsReachTheOperator) {
  Supervisor runner(1, GetParam());
  Request request = canary("none");
  const Verdict right = runner.run(request).verdict;
  request.mutant = "0:unique_shards";
  const Verdict wrong = runner.run(request).verdict;
  EXPECT_EQ(right.outcome, Outcome::Pass);
  EXPECT_EQ(wrong.outcome, Outcome::WrongValue);
  EXPECT_NE(right.digest, wrong.digest);
  EXPECT_EQ(wrong.digest, runner.run(canary("wrong")).verdict.digest);
}

INSTANTIATE_TEST_SUITE_P(Processes, SupervisorTest, testing::Values(1, 2));

}  // namespace
}  // namespace tp

int main(int argc, char** argv) {
  tp::add_canaries();
  if (argc > 1 && std::strcmp(argv[1], "worker") == 0) {
    tp::World world(&argc, &argv);
    return tp::worker_main(world, tp::Link::best);
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
