#pragma once
// What a fuzz job has seen so far: counts, the mix, what was covered, how near to the budgets it
// came, and how near to what the GPU could do.

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "harness/base/case.h"
#include "harness/base/verdict.h"
#include "harness/fuzz/domain.h"

namespace tp {

// How the passing cases of one operator stand to their floors: kernel_us / floor_us.
class FloorRatios {
 public:
  // The same shape once more is the same entry of slowest().
  struct Timed {
    Case c;
    Timing timing;
    double ratio() const { return timing.kernel_us / timing.floor_us; }
  };
  static constexpr std::size_t kKept = 3;

  void add(const Case& c, const Timing& timing);  // kernel_us and floor_us above 0
  std::int64_t count() const { return count_; }
  // To 1 %: a night has millions of cases, so they are counted in classes of that width.
  double median() const;
  // The largest ratios, of distinct shapes, worst first; at most kKept.
  const std::vector<Timed>& slowest() const { return slowest_; }

 private:
  std::int64_t count_ = 0;
  std::map<int, std::int64_t> classes_;
  std::vector<Timed> slowest_;
};

struct Summary {
  std::uint64_t seed = 0;
  double seconds = 0;
  std::map<Outcome, std::int64_t> outcomes;
  std::map<Outcome, std::string> reasons;      // the first of Refused, Mistrusted, Skipped each
  std::map<Relation, std::int64_t> relations;  // of cases with heads that ran
  std::map<std::string, std::int64_t> ops;
  std::map<DType, std::int64_t> dtypes;
  std::map<Fill, std::int64_t> fills;
  std::map<std::pair<std::string, DType>, double> scores;  // largest error/budget of passing cases
  std::map<std::string, FloorRatios> ratios;  // by operator; empty where nothing was measured
  std::uint64_t threads = 0;
  std::int64_t on_checkpoint = 0;  // cases that ran on tensors of the user's checkpoint
  bool of_adapter = false;         // those are an adapter's
  int unstable = 0;                // failures their own replay did not show
  int repeated = 0;                // findings with the signature of an earlier one
  int not_replayed = 0;  // failures whose replay did not come to an end: Ctrl-C, or no worker left
  int pairs_legal = -1;  // with --each: pairs of model and tp_size; else -1
  int pairs_refused = -1;
  int pairs_done = -1;

  void add(const Case& c, const Verdict& verdict);
  // Cases that say something about the code under test: passed or failed.
  std::int64_t ran() const;
  std::int64_t count(Outcome outcome) const;
  // The share of cases with heads whose KV heads meet the ranks like this.
  double share(Relation relation) const;
  // The slowest passing cases of all operators, worst first; at most FloorRatios::kKept.
  std::vector<FloorRatios::Timed> slowest() const;
  double cases_per_second() const { return seconds > 0 ? double(ran()) / seconds : 0; }
};

// A handful of lines for people, and the state in one line.
std::string summary_text(const Summary& summary);
std::string progress_text(const Summary& summary);

}  // namespace tp
