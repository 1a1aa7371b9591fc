#pragma once
// How long a case may take: so much longer than its operator ever took that only a hang exceeds it.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <map>
#include <string>

#include "harness/base/operator.h"

namespace tp {

// Of a deadline that was asked for; never 0, which would be none at all.
inline std::chrono::milliseconds milliseconds_of(double seconds) {
  return std::chrono::milliseconds(std::max<std::int64_t>(1, std::int64_t(seconds * 1000)));
}

// Seconds that a case may take for its work alone. A multiply-add takes the emulator and the
// reference about 3 ns together; sanitizers, laws and loaded machines take the rest.
inline double seconds_of_work(const Case& c) {
  const Operator& op = find_operator(c.op);
  return op.work ? 100e-9 * op.work(c) : 0;
}

class Deadlines {
 public:
  // `fixed`: seconds for every case, or 0: max(2 s, 20 times the slowest passing case of the
  // operator), and the seconds of its work in addition, which do not count as slow.
  explicit Deadlines(double fixed) : fixed_(fixed) {}

  void passed(const Case& c, double seconds) {
    slowest_[c.op] = std::max(slowest_[c.op], seconds - seconds_of_work(c));
  }

  std::chrono::milliseconds of(const Case& c) const {
    if (fixed_ > 0) return milliseconds_of(fixed_);
    const auto it = slowest_.find(c.op);
    // Before the first pass nothing is known: a sanitizer or a loaded machine may be slow.
    const double seconds = it == slowest_.end() ? 30 : std::max(2.0, 20 * it->second);
    return milliseconds_of(seconds + seconds_of_work(c));
  }

 private:
  double fixed_;
  std::map<std::string, double> slowest_;
};

}  // namespace tp
