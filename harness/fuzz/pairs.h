#pragma once
// fuzz --each: which pairs of model and tp_size are still to be run. A pair is done when each
// operator's case of it was run on data that could be trusted.

#include <cstddef>
#include <deque>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "harness/base/verdict.h"
#include "harness/fuzz/domain.h"

namespace tp {

class Pairs {
 public:
  explicit Pairs(EachPair each) : each_(std::move(each)) {
    open_.resize(std::size_t(each_.legal));
    for (std::size_t i = 0; i < each_.cases.size(); ++i) {
      ++open_[pair_of(i)];
      todo_.push_back(i);
    }
  }

  bool empty() const { return todo_.empty(); }
  int done() const { return done_; }

  // The next shape, made into a case by `draw_rest`.
  template <typename DrawRest>
  Case next(DrawRest draw_rest) {
    const std::size_t i = todo_.front();
    todo_.pop_front();
    const Case c = draw_rest(each_.cases[i]);
    running_.emplace(to_line(c), i);
    return c;
  }

  // What came of a case that next() gave out. `again`: if the data was not to be trusted, the shape
  // is drawn anew, after all others.
  void answered(const std::string& line, Outcome outcome, bool again) {
    const auto at = running_.find(line);
    const std::size_t i = at->second;
    running_.erase(at);
    if (outcome == Outcome::Mistrusted) {
      if (again) todo_.push_back(i);
    } else if (outcome != Outcome::Skipped) {
      done_ += --open_[pair_of(i)] == 0;
    }
  }

 private:
  // Cases come pair by pair, with one of each operator.
  std::size_t pair_of(std::size_t i) const {
    return i / (each_.cases.size() / std::size_t(each_.legal));
  }

  EachPair each_;
  std::deque<std::size_t> todo_;                     // of each_.cases
  std::multimap<std::string, std::size_t> running_;  // by case line
  std::vector<int> open_;                            // cases of a pair that are not done
  int done_ = 0;
};

}  // namespace tp
