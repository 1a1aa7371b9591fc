#include "harness/fuzz/replay.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string_view>

#include "harness/base/check.h"
#include "harness/base/exit_codes.h"
#include "harness/base/operator.h"
#include "harness/base/user_adapter.h"
#include "harness/base/user_checkpoint.h"
#include "harness/fuzz/both.h"
#include "harness/fuzz/deadlines.h"
#include "harness/fuzz/domain.h"
#include "harness/fuzz/driver.h"
#include "harness/fuzz/finding.h"
#include "harness/fuzz/interrupt.h"
#include "harness/fuzz/three_answers.h"
#include "harness/group/world.h"

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

// Prints what came of a case; `where` and `timeout` are for the line that runs it again.
void print_answer(const Answer& answer, int number, const Where& where, double timeout) {
  const Verdict& v = answer.verdict;
  if (!answer.log.empty()) fmt::print(stderr, "{}\n", answer.log);
  if (v.finding()) {
    Finding finding = not_replayed(answer, where);
    finding.replayed = finding.reproduced = true;
    finding.timeout = timeout;
    fmt::print("{}", finding_text(finding, number));
  } else {
    fmt::print("{}{}{}\n  case        {}\n", name_of(v.outcome), v.detail.empty() ? "" : "   ",
               v.detail, answer.request.line);
  }
}

void print_timing(const Verdict& v) {
  if (v.outcome == Outcome::Pass && v.timing.measured())
    fmt::print("  timing      {}\n", timing_text(v.timing));
}

void print_trace(const Answer& answer, const std::string& prefix = "") {
  for (const std::string& line : answer.trace) fmt::print("{}{}\n", prefix, line);
}

struct Ran {
  Verdict verdict;
  std::exception_ptr cut_short = nullptr;  // a finding was seen before Interrupted or GaveUp came
};

// Runs a case once, prints what came of it, and returns that. `number`: of the finding, if it is
// one.
using RunOnce = std::function<Ran(const Request& request, int number)>;

RunOnce one_answer(Runner& runner, const Where& where, double timeout) {
  return [&runner, where, timeout](const Request& request, int number) {
    const Answer answer = runner.run(request);
    print_trace(answer);
    print_answer(answer, number, where, timeout);
    const Verdict& v = answer.verdict;
    fmt::print("  digest      {:016x}   error/budget {:.3f}, {:.3g} ms\n", v.digest, v.score,
               v.seconds * 1e3);
    print_timing(v);
    return Ran{v};
  };
}

RunOnce three_answers(Supervisor& gpu, Supervisor& emulator, const Where& where, double timeout) {
  return [&gpu, &emulator, where, timeout](const Request& request, int number) {
    Request whole = request;
    Case c = case_from_line(request.line);
    c.tp_size = 1;
    whole.line = to_line(c);
    std::exception_ptr cut_short;
    const auto run = [&](std::string_view name, const std::function<Answer()>& get) {
      Answer answer;
      answer.request = request;
      answer.verdict = {.outcome = Outcome::Skipped, .detail = "no answer"};
      if (cut_short) return answer;
      try {
        answer = get();
      } catch (const Interrupted&) {
        cut_short = std::current_exception();
      } catch (const GaveUp&) {
        cut_short = std::current_exception();
      }
      print_trace(answer, fmt::format("{:<8}  ", name));
      return answer;
    };
    const Answer on_gpu = run("gpu", [&] { return gpu.run(request); });
    const Answer in_emulator = run("emulator", [&] { return emulator.run(request); });
    const Answer one_rank = run("one rank", [&] { return emulator.alone().run(whole); });
    const ThreeAnswers answers{on_gpu.verdict, in_emulator.verdict, one_rank.verdict};
    Answer all = on_gpu;
    all.verdict = overall(answers);
    // Of a case that was broken off nobody can say that it passes.
    if (cut_short && !all.verdict.finding()) std::rethrow_exception(cut_short);
    for (const std::string& log : {in_emulator.log, one_rank.log}) {
      all.log += (all.log.empty() || log.empty() ? "" : "\n") + log;
    }
    print_answer(all, number, where, timeout);
    fmt::print("{}", three_answers_text(answers));
    print_timing(on_gpu.verdict);
    return Ran{all.verdict, cut_short};
  };
}

int replay_all(const std::vector<Case>& cases, const ReplayOptions& options, double deadline,
               const RunOnce& run_once) {
  int failed = 0, trusted = 0, done = 0;
  const int runs = int(cases.size()) * options.times;
  const auto run_all = [&] {
    while (done < runs) {
      const Request request{.line = to_line(cases[std::size_t(done / options.times)]),
                            .mutant = options.mutant,
                            .deadline = milliseconds_of(deadline),
                            .trace = options.trace,
                            .poison = options.poison,
                            .serial = options.serial};
      const auto [v, cut_short] = run_once(request, failed + 1);
      std::fflush(stdout);
      ++done;
      if (v.outcome == Outcome::Refused && !options.model.empty()) throw BadInput(v.detail);
      failed += v.finding();
      trusted += v.outcome < Outcome::Refused;
      if (cut_short) std::rethrow_exception(cut_short);
    }
  };
  int cut_short = 0;  // the exit code that goes with it
  try {
    run_all();
  } catch (const Interrupted&) {
    cut_short = kExitInterrupted;
    fmt::print(stderr, "interrupted: what there is so far\n");
  } catch (const GaveUp& e) {
    cut_short = failed > 0 ? kExitFinding : e.exit_code;
    fmt::print(stderr, "tpcheck: {}\n", e.what());
  }
  if (runs > 1) fmt::print("{} of {} runs failed\n", failed, done);
  if (cut_short != 0) return cut_short;
  return failed > 0 ? kExitFinding : trusted == 0 ? kExitNothingRan : 0;
}

}  // namespace

int replay_main(World* world, const ReplayOptions& options) {
  std::vector<Case> cases;
  Where one_job = options.where;
  one_job.jobs = 1;
  on_all_processes(world, [&] {
    if (!options.adapter.empty()) {
      if (options.model.empty()) throw BadInput(std::string(kAdapterNeedsModel));
      one_job.adapter = options.adapter;
      one_job.base = options.model;
    }
    set_user_adapter(one_job.adapter, one_job.base);
    one_job.checkpoint = user_adapter() ? user_adapter_base()->checkpoint : options.model;
    set_user_checkpoint(one_job.checkpoint);
    user_checkpoint();
    cases = read_cases(options.inputs);
  });
  if (options.times < 1) throw BadInput(fmt::format("--times {}: less than once", options.times));
  for (const Case& c : cases) check_mutant(c, options.mutant);
  const double deadline = options.timeout > 0 ? options.timeout : kDefaultTimeout;
  const auto say_where = [&](const std::string& where) {
    fmt::print(stderr, "{}", header_text(where, options.poison));
    if (!one_job.checkpoint.empty()) fmt::print(stderr, "checkpoint {}\n", user_checkpoint_text());
    if (!one_job.adapter.empty()) fmt::print(stderr, "adapter {}\n", user_adapter_text());
  };
  if (one_job.on == kBoth && !World::launched()) {
    return with_both(one_job, [&](Supervisor& gpu, Supervisor& emulator) {
      say_where(Both(gpu, emulator).where());
      return replay_all(cases, options, deadline,
                        three_answers(gpu, emulator, one_job, options.timeout));
    });
  }
  return with_runner(world, one_job, [&](Runner& runner, const Where& where) {
    say_where(runner.where());
    return replay_all(cases, options, deadline, one_answer(runner, where, options.timeout));
  });
}

}  // namespace tp
