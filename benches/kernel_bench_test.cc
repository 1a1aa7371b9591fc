// What is timed was right, on all ranks of all processes, or it is said and not timed.

#include "benches/kernel_bench.h"

#include <benchmark/benchmark.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <sstream>

#include "benches/bench_data.h"
#include "harness/group/world.h"

namespace tp {
namespace {

constexpr int kRanks = 4;

// Every rank gets every rank's number.
class GatherCall final : public KernelCall {
 public:
  GatherCall(const BenchRank& rank, std::uint64_t seed, float error)
      : group_(rank.group),
        seed_(float(seed)),
        mine_(bench_values(rank.stream, "mine",
                           std::vector<float>{10 * seed_ + float(group_.tp_rank()) + error})),
        all_(bench_output(rank.stream, "all", kRanks * sizeof(float))) {}

  void launch(Stream& stream) override {
    group_.all_gather<float>(mine_.as<float>(), all_.as<float>(), 1, stream);
  }
  std::string verify(Stream& stream) override {
    Budget expected(1, kRanks);
    for (int r = 0; r < kRanks; ++r) expected.r[std::size_t(r)] = 10 * double(seed_) + r;
    return wrong_rows(stream, all_, DType::f32, 0, expected);
  }

 private:
  TpGroup& group_;
  float seed_;
  Buffer mine_, all_;
};

// What Google Benchmark says of the benchmark `name`, which has errors in rank 2's number with
// these seeds.
std::string report_of(const std::string& name, std::vector<std::uint64_t> wrong_seeds) {
  register_kernel_bench({.name = name,
                         .work = {.read = 4, .written = 4 * kRanks},
                         .tp_size = kRanks,
                         .make = [=](const BenchRank& rank, std::uint64_t seed) {
                           const bool wrong =
                               std::count(wrong_seeds.begin(), wrong_seeds.end(), seed);
                           return std::make_unique<GatherCall>(
                               rank, seed, wrong && rank.group.tp_rank() == 2 ? 1.0f : 0.0f);
                         }});
  std::ostringstream out;
  benchmark::JSONReporter reporter;
  reporter.SetOutputStream(&out);
  reporter.SetErrorStream(&out);
  benchmark::RunSpecifiedBenchmarks(&reporter, "^" + name + "/cache:warm");
  return World::current().broadcast(out.str());
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST(KernelBench, RanksOfAllProcessesAreTimedTogether) {
  const std::string said = report_of("right", {});
  EXPECT_FALSE(has(said, "error")) << said;
  const double processes = std::min(kRanks, World::current().processes());
  EXPECT_TRUE(has(said, fmt::format("\"processes\": {:.16e}", processes))) << said;
  EXPECT_TRUE(has(said, "\"slowest_rank\"")) << said;
}

TEST(KernelBench, AWrongResultIsReportedAndNotTimed) {
  // With the inputs before the timed loop, in it, and after it.
  for (const std::uint64_t seed : {1, 2, 3}) {
    const std::string said = report_of(fmt::format("wrong{}", seed), {seed});
    EXPECT_TRUE(has(said, fmt::format("tp_rank 0: all[0, 2] is {}, accepted {} .. {}",
                                      10 * seed + 3, 10 * seed + 2, 10 * seed + 2)))
        << said;
    EXPECT_FALSE(has(said, "bytes_per_second")) << said;
  }
}

TEST(KernelBench, AFaultIsReportedAndTheNextBenchmarkRuns) {
  register_kernel_bench(
      {.name = "faulty",
       .tp_size = 2,
       .make = [](const BenchRank& rank, std::uint64_t) -> std::unique_ptr<KernelCall> {
         throw Fault{Outcome::BadLaunch, "no such size", rank.group.tp_rank()};
       }});
  std::ostringstream out;
  benchmark::JSONReporter reporter;
  reporter.SetOutputStream(&out);
  reporter.SetErrorStream(&out);
  benchmark::RunSpecifiedBenchmarks(&reporter, "^faulty/cache:warm");
  const std::string said = World::current().broadcast(out.str());
  EXPECT_TRUE(has(said, "no such size")) << said;
  EXPECT_FALSE(has(report_of("next", {}), "error"));
}

}  // namespace
}  // namespace tp
