#include "harness/fuzz/fuzz.h"

#include <fmt/format.h>

#include <chrono>
#include <deque>
#include <numeric>
#include <random>
#include <set>

#include "harness/base/check.h"
#include "harness/base/exit_codes.h"
#include "harness/base/user_adapter.h"
#include "harness/base/user_checkpoint.h"
#include "harness/fuzz/artifacts.h"
#include "harness/fuzz/deadlines.h"
#include "harness/fuzz/draw.h"
#include "harness/fuzz/driver.h"
#include "harness/fuzz/interrupt.h"
#include "harness/fuzz/pairs.h"
#include "harness/fuzz/report_json.h"

namespace tp {

namespace {

constexpr double kDefaultSeconds = 60;
constexpr int kEachMaxTp = 64;
// Where nothing can be trusted or everything is skipped, drawing on is of no use.
constexpr std::int64_t kHopeless = 1000;
constexpr std::chrono::milliseconds kHangDeadline{5000};

class Fuzzer {
 public:
  Fuzzer(Runner& runner, const Where& where, const Domain& domain, const FuzzOptions& options,
         std::uint64_t seed, const Artifacts* artifacts, Progress& progress,
         const FindingReport& report)
      : runner_(runner),
        where_(where),
        options_(options),
        artifacts_(artifacts),
        progress_(progress),
        report_(report),
        mutant_(domain.mutant),
        draw_(domain, seed),
        deadlines_(options.timeout) {
    result_.summary.seed = seed;
    result_.summary.of_adapter = !domain.adapter.empty();
    seconds_ = options.for_seconds > 0 || options.cases > 0 || options.each ? options.for_seconds
                                                                            : kDefaultSeconds;
    if (options.each) {
      EachPair each = each_pair(domain);
      result_.summary.pairs_legal = each.legal;
      result_.summary.pairs_refused = each.refused;
      pairs_.emplace(std::move(each));
    }
  }

  FuzzResult run() {
    try {
      while (in_flight_ > 0 || wants_more()) {
        while (failures_.empty() && runner_.has_room() && wants_more()) submit();
        if (in_flight_ > 0) take(runner_.wait());
        while (in_flight_ == 0 && !failures_.empty() && !ended()) {
          const Answer failure = std::move(failures_.front());
          failures_.pop_front();
          handle(failure);
        }
      }
    } catch (const Interrupted&) {
      result_.interrupted = true;
    } catch (const GaveUp& e) {
      result_.gave_up = e;
    }
    progress_.clear();
    if (ended()) {
      for (const Answer& failure : failures_) report(not_replayed(failure, where_));
    }
    if (pairs_) result_.summary.pairs_done = pairs_->done();
    result_.summary.seconds = elapsed();
    return std::move(result_);
  }

 private:
  double elapsed() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

  // Nothing can be run any more, or nothing shall.
  bool ended() const { return result_.interrupted || result_.gave_up; }

  bool wants_more() const {
    if (ended() || (!result_.findings.empty() && !options_.keep_going)) return false;
    if (seconds_ > 0 && elapsed() >= seconds_) return false;
    const std::int64_t ran = result_.summary.ran();
    if (pairs_ ? pairs_->empty() : ran == 0 && answers_ >= kHopeless) return false;
    return options_.cases == 0 || ran + in_flight_ < options_.cases;
  }

  Request request_for(const Case& c) const {
    return {.line = to_line(c),
            .mutant = mutant_,
            .deadline = deadlines_.of(c),
            .poison = options_.poison};
  }

  void submit() {
    const auto rest = [&](const Case& shape) { return draw_.rest(shape); };
    const Case c = pairs_ ? pairs_->next(rest) : draw_.next();
    runner_.submit(request_for(c));
    ++in_flight_;
  }

  void take(Answer answer) {
    --in_flight_;
    ++answers_;
    const Case c = case_from_line(answer.request.line);
    // Of several jobs on one GPU nobody can say whose kernels took the time.
    if (where_.jobs > 1) answer.verdict.timing = {};
    const Verdict& v = answer.verdict;
    // Cases are drawn legal: it is the checkpoint or the adapter that has become another.
    if (v.outcome == Outcome::Refused && !(where_.checkpoint.empty() && where_.adapter.empty()))
      throw BadInput(v.detail);
    result_.summary.add(c, v);
    if (v.outcome == Outcome::Pass) deadlines_.passed(c, v.seconds);
    if (pairs_) {
      const bool again = answers_ < kHopeless + 100 * std::int64_t(result_.summary.pairs_legal);
      pairs_->answered(answer.request.line, v.outcome, again);
    }
    if (v.finding()) {
      if (result_.seconds_to_first == 0) result_.seconds_to_first = elapsed();
      keep(c, answer.log);  // before anything else can go wrong
      failures_.push_back(std::move(answer));
    }
    if (progress_.due()) {
      result_.summary.seconds = elapsed();
      progress_.update(progress_text(result_.summary));
    }
  }

  void handle(const Answer& failure) {
    if (!result_.findings.empty() && !options_.keep_going) return;
    if (signatures_.contains(signature(failure))) {
      ++result_.summary.repeated;
      return;
    }
    progress_.clear();
    const auto request = [&](const Case& smaller) {
      Request r = request_for(smaller);
      // Every step on the way down from a hang costs its deadline.
      if (failure.verdict.outcome == Outcome::Hang)
        r.deadline =
            std::min(r.deadline, kHangDeadline + milliseconds_of(seconds_of_work(smaller)));
      return r;
    };
    Finding finding = investigate(runner_, failure, request, where_, {});
    if (finding.reproduced) {
      keep(finding.smallest, finding.log);
      signatures_.insert(signature(failure));
    }
    if (finding.interrupted) result_.interrupted = true;
    if (finding.gave_up) result_.gave_up = finding.gave_up;
    report(std::move(finding));
  }

  void report(Finding finding) {
    finding.timeout = options_.timeout;
    report_(finding);
    Summary& s = result_.summary;
    if (!finding.reproduced) ++(finding.replayed ? s.unstable : s.not_replayed);
    auto& list = finding.reproduced ? result_.findings
                 : finding.replayed ? result_.unstable
                                    : result_.not_replayed;
    list.push_back(std::move(finding));
  }

  // A folder that can be written no longer costs the file, not the finding.
  void keep(const Case& c, const std::string& log) {
    if (!artifacts_) return;
    try {
      artifacts_->write(c);
      if (!log.empty()) artifacts_->write(c, ".log", log + "\n");
    } catch (const BadInput& e) {
      progress_.clear();
      fmt::print(stderr, "not kept: {}\n", e.what());
    }
  }

  Runner& runner_;
  const Where where_;
  const FuzzOptions& options_;
  const Artifacts* artifacts_;
  Progress& progress_;
  const FindingReport& report_;
  const std::string mutant_;
  Draw draw_;
  Deadlines deadlines_;
  double seconds_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::optional<Pairs> pairs_;  // with --each
  std::deque<Answer> failures_;
  std::set<std::string> signatures_;
  std::int64_t in_flight_ = 0;
  std::int64_t answers_ = 0;
  FuzzResult result_;
};

}  // namespace

int FuzzResult::exit_code() const {
  if (!findings.empty()) return kExitFinding;
  // What nothing was left to replay was seen nevertheless.
  if (gave_up) return not_replayed.empty() ? gave_up->exit_code : kExitFinding;
  if (interrupted) return kExitInterrupted;
  if (!unstable.empty()) return kExitUnstable;
  return summary.ran() == 0 || summary.pairs_done < summary.pairs_legal ? kExitNothingRan : 0;
}

FuzzResult fuzz(Runner& runner, const Where& where, const Domain& domain,
                const FuzzOptions& options, std::uint64_t seed, const Artifacts* artifacts,
                Progress& progress, const FindingReport& report) {
  return Fuzzer(runner, where, domain, options, seed, artifacts, progress, report).run();
}

std::uint64_t random_seed() { return std::random_device{}(); }

int fuzz_main(World* world, const FuzzOptions& options) {
  std::vector<int> tp_sizes = options.tp_sizes;
  if (tp_sizes.empty()) {
    tp_sizes.resize(options.each ? kEachMaxTp : 16);
    std::iota(tp_sizes.begin(), tp_sizes.end(), 1);
  }
  Domain domain;
  Where wanted = options.where;
  std::vector<std::string> without_tensors;
  on_all_processes(world, [&] {
    domain = make_domain(options.ops, tp_sizes, options.models, options.mutant, options.adapter);
    wanted.checkpoint = domain.checkpoint;
    set_user_checkpoint(domain.checkpoint);
    if (!domain.adapter.empty()) {
      wanted.adapter = domain.adapter;
      wanted.base = options.models[0];
    }
    set_user_adapter(wanted.adapter, wanted.base);
    // What is wrong with them is said before any job starts.
    if (user_checkpoint() != nullptr || user_adapter() != nullptr)
      without_tensors = add_checkpoint_cases(domain);
  });
  const std::uint64_t seed = options.seed.value_or(random_seed());
  return with_runner(world, wanted, [&](Runner& runner, const Where& where) {
    const Artifacts artifacts(options.artifacts);  // what cannot be written is all there is to say
    fmt::print(stderr, "{}seed {}\n", header_text(runner.where(), options.poison), seed);
    if (!domain.checkpoint.empty()) fmt::print(stderr, "checkpoint {}\n", user_checkpoint_text());
    if (!domain.adapter.empty()) fmt::print(stderr, "adapter {}\n", user_adapter_text());
    for (const std::string& why : without_tensors) fmt::print(stderr, "{}\n", why);
    for (const Model& model : domain.models) {
      if (!model.note.empty()) fmt::print(stderr, "{}: {}\n", model.id, model.note);
    }
    Progress progress(Progress::Show::yes);
    int number = 0;
    std::FILE* to = options.json ? stderr : stdout;
    const FindingReport report = [&](const Finding& finding) {
      fmt::print(to, "{}\n", finding_text(finding, number += finding.reproduced));
      std::fflush(to);
    };
    FuzzResult result = fuzz(runner, where, domain, options, seed, &artifacts, progress, report);
    result.where = runner.where();
    result.poison = options.poison;
    if (result.gave_up) fmt::print(stderr, "tpcheck: {}\n", result.gave_up->what());
    if (result.interrupted) fmt::print(stderr, "interrupted: what there is so far\n");
    fmt::print("{}{}", options.json ? to_json(result) : summary_text(result.summary),
               options.json ? "\n" : "");
    if (!options.poison && !options.json) fmt::print("  not checked {}\n", kNoPoison);
    std::fflush(stdout);
    return result.exit_code();
  });
}

}  // namespace tp
