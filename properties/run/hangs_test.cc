// Ranks that wait for each other for ever: each way of it is told within seconds, with the rank to
// blame, and the next case runs. What it took is printed as a table; on the emulator and on GPUs.
// This executable is its own worker, and so has a main of its own.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <regex>

#include "harness/base/check.h"
#include "harness/fuzz/supervisor.h"
#include "harness/fuzz/worker.h"
#include "harness/group/place.h"
#include "harness/group/world.h"
#include "properties/run/hangs_testing.h"

namespace tp {
namespace {

constexpr std::chrono::milliseconds kDeadline(2000);
constexpr double kSecondsToTell = 5, kSecondsToGoOn = 20;
constexpr int kRanks = 8;
constexpr int kUnavailable = 3;  // GaveUp's exit code where the machine lacks something

Request request(int tp_size, const std::string& fault = "none", int fault_rank = 0, int seed = 1) {
  return {
      .line = fmt::format("v1 hang hidden_size={} tp_size={} num_tokens={} seed={} law={} "
                          "graph={} delays={} fault={} fault_rank={}",
                          12 * tp_size, tp_size, 1 + seed % 5, seed, seed % 3 == 0 ? "tp1" : "none",
                          seed / 2 % 2, seed / 4 % 2, fault, fault_rank),
      .mutant = "",
      .deadline = kDeadline,
      .trace = false};
}

// The ranks that a detail names, in its order.
std::vector<int> ranks_in(const std::string& detail) {
  static const std::regex name("\\btp_rank (\\d+)\\b");
  std::vector<int> ranks;
  for (std::sregex_iterator it(detail.begin(), detail.end(), name), end; it != end; ++it) {
    ranks.push_back(std::stoi((*it)[1]));
  }
  return ranks;
}

Outcome expected(const std::string& fault) {
  if (fault == "spins" || fault == "lost_event") return Outcome::Hang;
  return fault == "killed" || fault == "crashes" ? Outcome::Crash : Outcome::CollectiveMismatch;
}

// How a job's processes meet.
struct Job {
  int processes;
  Link link = Link::best;
};

struct Row {
  Job job;
  std::string fault;
  int fault_rank;
  Outcome outcome;
  double told;       // seconds from the request to its verdict
  double next_case;  // seconds from there to the next case's
  std::string detail;
};
std::vector<Row> table;

void print_table() {
  constexpr std::size_t kDetail = 90;
  if (table.empty()) return;
  fmt::print("\n{}: one rank of {} does not go on; deadline {} ms\n", executor_name(), kRanks,
             kDeadline.count());
  fmt::print("{:>9}  {:<5}  {:<12}  {:>10}  {:<18}  {:>8}  {:>12}  {}\n", "processes", "group",
             "fault", "fault_rank", "verdict", "told, ms", "next one, ms", "detail");
  for (const Row& r : table) {
    fmt::print("{:>9}  {:<5}  {:<12}  {:>10}  {:<18}  {:>8.1f}  {:>12.1f}  {}{}\n", r.job.processes,
               kLinkWords[std::size_t(r.job.link)], r.fault, r.fault_rank, name_of(r.outcome),
               r.told * 1e3, r.next_case * 1e3, r.detail.substr(0, kDetail),
               r.detail.size() > kDetail ? " ..." : "");
  }
}

Answer timed(Runner& runner, const Request& request, double& seconds) {
  const auto start = std::chrono::steady_clock::now();
  Answer answer = runner.run(request);
  seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return answer;
}

void expect_no_false_alarm(Runner& runner, int first_seed) {
  for (int tp_size = 1; tp_size <= 16; ++tp_size) {
    const Answer answer = runner.run(request(tp_size, "none", 0, first_seed + tp_size));
    EXPECT_EQ(name_of(answer.verdict.outcome), name_of(Outcome::Pass))
        << answer.request.line << "\n"
        << answer.verdict.detail;
  }
}

void expect_told(Runner& runner, const Job& job, const std::string& fault, int fault_rank) {
  SCOPED_TRACE(fmt::format("fault={} fault_rank={}", fault, fault_rank));
  double told = 0, next_case = 0;
  Request asked = request(kRanks, fault, fault_rank);
  asked.serial = fault == "crashes";  // as a finding is investigated
  const Verdict v = timed(runner, asked, told).verdict;
  EXPECT_EQ(name_of(v.outcome), name_of(expected(fault))) << v.detail;
  EXPECT_LT(told, kSecondsToTell);
  const std::vector<int> ranks = ranks_in(v.detail);
  EXPECT_TRUE(std::find(ranks.begin(), ranks.end(), fault_rank) != ranks.end()) << v.detail;
  // A job that dies says what all of its processes were at.
  if (fault != "killed" && !ranks.empty()) {
    EXPECT_EQ(ranks.front(), fault_rank) << v.detail;
  }
  const Verdict next = timed(runner, request(kRanks), next_case).verdict;
  EXPECT_EQ(name_of(next.outcome), name_of(Outcome::Pass)) << next.detail;
  EXPECT_LT(next_case, kSecondsToGoOn);
  table.push_back({job, fault, fault_rank, v.outcome, told, next_case, v.detail});
}

class HangsTest : public testing::TestWithParam<Job> {
 protected:
  // Throws Unavailable, or GaveUp with exit code 3, where the machine cannot do it.
  std::unique_ptr<Supervisor> started() {
    auto runner =
        std::make_unique<Supervisor>(1, GetParam().processes, this_executor(GetParam().link));
    runner->wait_until_ready();
    return runner;
  }
};

TEST_P(HangsTest, AreToldInTimeBlamedOnTheirRankAndSurvived) {
  std::unique_ptr<Supervisor> runner;
  try {
    runner = started();
  } catch (const Unavailable& e) {
    if (GetParam().processes == 1) throw;
    GTEST_SKIP() << e.what();
  } catch (const GaveUp& e) {
    if (e.exit_code != kUnavailable || GetParam().processes == 1) throw;
    GTEST_SKIP() << e.what();
  }
  expect_no_false_alarm(*runner, 100);
  for (std::size_t fault = 1; fault < kHangFaults.size(); ++fault) {
    for (const int rank : {0, 5}) expect_told(*runner, GetParam(), kHangFaults[fault], rank);
  }
  expect_no_false_alarm(*runner, 200);
}

INSTANTIATE_TEST_SUITE_P(Processes, HangsTest,
                         testing::Values(Job{1}, Job{2}, Job{2, Link::mpi}, Job{4}),
                         [](const auto& info) {
                           return fmt::format("n{}_{}", info.param.processes,
                                              kLinkWords[std::size_t(info.param.link)]);
                         });

}  // namespace
}  // namespace tp

int main(int argc, char** argv) {
  tp::add_hang_operator();
  if (argc > 1 && std::strcmp(argv[1], "worker") == 0) {
    const auto* word = std::find(tp::kLinkWords.begin(), tp::kLinkWords.end(), argv[argc - 1]);
    const auto link = word == tp::kLinkWords.end() ? 0 : word - tp::kLinkWords.begin();
    tp::World world(&argc, &argv);
    return tp::worker_main(world, tp::Link(link));
  }
  testing::InitGoogleTest(&argc, argv);
  const int result = RUN_ALL_TESTS();
  tp::print_table();
  return result;
}
