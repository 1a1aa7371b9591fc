#include "harness/cli/bench.h"

#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include <memory>

#include "harness/base/check.h"
#include "harness/base/exit_codes.h"
#include "harness/base/text.h"
#include "harness/cli/baseline.h"
#include "harness/fuzz/where.h"
#include "harness/group/place.h"
#include "harness/group/world.h"

namespace tp {

namespace {

// The file that a flag of our own names, taken out of the arguments.
std::string take_flag(std::vector<std::string>& arguments, const std::string& flag) {
  std::string value;
  std::erase_if(arguments, [&](const std::string& argument) {
    if (!argument.starts_with(flag + "=")) return false;
    value = argument.substr(flag.size() + 1);
    if (value.empty()) throw BadInput(flag + " needs a file");
    return true;
  });
  return value;
}

bool is_output_flag(const std::string& argument) { return argument.starts_with("--benchmark_out"); }

// Newer versions of Google Benchmark have another word for it.
template <typename Run>
bool failed_run(const Run& run) {
  if constexpr (requires { run.error_occurred; }) {
    return run.error_occurred;
  } else {
    return run.skipped != 0;
  }
}

// Reports as another one does, and keeps the times and whether something went wrong.
class KeepingReporter final : public benchmark::BenchmarkReporter {
 public:
  explicit KeepingReporter(benchmark::BenchmarkReporter* shown) : shown_(shown) {}

  bool ReportContext(const Context& context) override {
    return shown_ == nullptr || shown_->ReportContext(context);
  }
  void ReportRuns(const std::vector<Run>& runs) override {
    if (shown_ != nullptr) shown_->ReportRuns(runs);
    for (const Run& run : runs) {
      failed_ |= failed_run(run);
      if (failed_run(run) || run.run_type != Run::RT_Iteration) continue;
      const double seconds =
          run.GetAdjustedRealTime() / benchmark::GetTimeUnitMultiplier(run.time_unit);
      times_.push_back({run.benchmark_name(), seconds * 1e6});
    }
  }
  void Finalize() override {
    if (shown_ != nullptr) shown_->Finalize();
  }

  bool failed() const { return failed_; }
  const std::vector<BenchTime>& times() const { return times_; }

 private:
  benchmark::BenchmarkReporter* shown_;
  bool failed_ = false;
  std::vector<BenchTime> times_;
};

}  // namespace

int bench_main(World& world, std::vector<std::string> arguments) {
  for (const std::string& argument : arguments) {
    if (argument.find("aggregates_only") != std::string::npos)
      throw BadInput(printable(argument) + ": each run must be seen, to tell whether it was right");
  }
  const std::string baseline_file = take_flag(arguments, "--baseline");
  const std::vector<BenchTime> baseline =
      baseline_file.empty() ? std::vector<BenchTime>() : read_baseline(baseline_file);
  // One process speaks; the others run the same benchmarks.
  if (!world.is_root()) std::erase_if(arguments, is_output_flag);
  std::vector<std::string> words = {"tpcheck bench"};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  int argc = int(words.size());
  benchmark::Initialize(&argc, argv.data());  // takes out what it knows
  if (argc > 1) {
    throw BadInput(
        fmt::format("unknown argument '{}' (see tpcheck bench --help)", printable(argv[1])));
  }
  benchmark::AddCustomContext("where",
                              place_phrase(executor_name(), take_place(world, Link::best)));
  const std::unique_ptr<benchmark::BenchmarkReporter> shown(
      world.is_root() ? benchmark::CreateDefaultDisplayReporter() : nullptr);
  KeepingReporter reporter(shown.get());
  // With nothing to run it says so itself.
  const std::size_t matched = benchmark::RunSpecifiedBenchmarks(&reporter);
  benchmark::Shutdown();
  if (matched == 0) return kExitBadInput;
  if (!baseline.empty() && world.is_root())
    fmt::print("\nAgainst {}:\n{}", printable(baseline_file),
               against_baseline(baseline, reporter.times()));
  return world.max(reporter.failed()) > 0 ? kExitFinding : 0;
}

}  // namespace tp
