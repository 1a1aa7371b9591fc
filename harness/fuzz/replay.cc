#include "harness/fuzz/replay.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>

#include "harness/base/check.h"
#include "harness/base/operator.h"
#include "harness/fuzz/deadlines.h"
#include "harness/fuzz/driver.h"
#include "harness/fuzz/finding.h"
#include "harness/fuzz/interrupt.h"

namespace tp {

namespace {

namespace fs = std::filesystem;

constexpr double kDefaultTimeout = 30;

void add_file(const fs::path& path, std::vector<Case>& cases) {
  std::ifstream in(path);
  if (!in) throw BadInput(fmt::format("cannot read {}", path.string()));
  int number = 0;
  for (std::string line; std::getline(in, line);) {
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string::npos || line.starts_with("#")) continue;
    try {
      cases.push_back(case_from_line(line));
    } catch (const BadInput& e) {
      throw BadInput(fmt::format("{}:{}: {}", path.string(), number, e.what()));
    }
  }
}

std::vector<Case> read_cases(const std::vector<std::string>& inputs) {
  std::vector<Case> cases;
  std::error_code ignored;
  for (const std::string& input : inputs) {
    if (fs::is_directory(input, ignored)) {
      std::vector<fs::path> files;
      for (const auto& entry : fs::directory_iterator(input)) {
        if (entry.path().extension() == ".case") files.push_back(entry.path());
      }
      std::sort(files.begin(), files.end());
      for (const fs::path& file : files) add_file(file, cases);
    } else if (fs::exists(input, ignored)) {
      add_file(input, cases);
    } else if (input.find(' ') == std::string::npos) {
      throw BadInput(fmt::format("'{}' is neither a case line nor a file", input));
    } else {
      cases.push_back(case_from_line(input));
    }
  }
  if (cases.empty()) throw BadInput("no case to replay");
  return cases;
}

void check_mutant(const Case& c, const std::string& id) {
  if (id.empty()) return;
  const std::vector<FoundMutant> found = find_mutant(id);
  if (std::none_of(found.begin(), found.end(),
                   [&](const FoundMutant& f) { return f.op->name == c.op; })) {
    throw BadInput(fmt::format("{} has no mutant '{}'", c.op, id));
  }
}

// Runs the case once and prints what came of it. `processes` and `timeout` are for the line that
// does it again.
Verdict replay_once(Runner& runner, const Request& request, int number, int processes,
                    double timeout) {
  const Answer answer = runner.run(request);
  const Verdict& v = answer.verdict;
  for (const std::string& line : answer.trace) fmt::print("{}\n", line);
  if (!answer.log.empty()) fmt::print(stderr, "{}\n", answer.log);
  if (v.finding()) {
    Finding finding = not_replayed(answer, processes);
    finding.replayed = finding.reproduced = true;
    finding.timeout = timeout;
    fmt::print("{}", finding_text(finding, number));
  } else {
    fmt::print("{}{}{}\n  case        {}\n", name_of(v.outcome), v.detail.empty() ? "" : "   ",
               v.detail, request.line);
  }
  fmt::print("  digest      {:016x}   error/budget {:.3f}, {:.3g} ms\n", v.digest, v.score,
             v.seconds * 1e3);
  if (v.outcome == Outcome::Pass && v.timing.measured())
    fmt::print("  timing      {}\n", timing_text(v.timing));
  std::fflush(stdout);
  return v;
}

}  // namespace

int replay_main(World* world, const ReplayOptions& options) {
  const std::vector<Case> cases = read_cases(options.inputs);
  if (options.times < 1) throw BadInput(fmt::format("--times {}: less than once", options.times));
  for (const Case& c : cases) check_mutant(c, options.mutant);
  const double timeout = options.timeout > 0 ? options.timeout : kDefaultTimeout;
  const RunnerOptions one_job{.processes = options.processes, .jobs = 1, .on = options.on};
  return with_runner(world, one_job, [&](Runner& runner) {
    int failed = 0, trusted = 0, done = 0;
    const int runs = int(cases.size()) * options.times;
    const auto run_all = [&] {
      for (; done < runs; ++done) {
        const Case& c = cases[std::size_t(done / options.times)];
        const Request request{.line = to_line(c),
                              .mutant = options.mutant,
                              .deadline = milliseconds_of(timeout),
                              .trace = options.trace};
        const Verdict v =
            replay_once(runner, request, failed + 1, processes_of(world, one_job), options.timeout);
        failed += v.finding();
        trusted += v.outcome < Outcome::Refused;
      }
    };
    bool interrupted = false;
    try {
      run_all();
    } catch (const Interrupted&) {
      interrupted = true;
      fmt::print(stderr, "interrupted: what there is so far\n");
    }
    if (runs > 1) fmt::print("{} of {} runs failed\n", failed, done);
    if (interrupted) return 72;
    return failed > 0 ? 1 : trusted == 0 ? 4 : 0;
  });
}

}  // namespace tp
