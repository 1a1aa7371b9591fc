#pragma once
// How long a case may take: so much longer than its operator ever took that only a hang exceeds it.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <map>
#include <string>

namespace tp {

// Of a deadline that was asked for; never 0, which would be none at all.
inline std::chrono::milliseconds milliseconds_of(double seconds) {
  return std::chrono::milliseconds(std::max<std::int64_t>(1, std::int64_t(seconds * 1000)));
}

class Deadlines {
 public:
  // `fixed`: seconds for every case, or 0: max(2 s, 20 times the slowest passing case of the
  // operator).
  explicit Deadlines(double fixed) : fixed_(fixed) {}

  void passed(const std::string& op, double seconds) {
    slowest_[op] = std::max(slowest_[op], seconds);
  }

  std::chrono::milliseconds of(const std::string& op) const {
    const auto it = slowest_.find(op);
    // Before the first pass nothing is known: a sanitizer or a loaded machine may be slow.
    const double seconds = fixed_ > 0             ? fixed_
                           : it == slowest_.end() ? 30
                                                  : std::max(2.0, 20 * it->second);
    return milliseconds_of(seconds);
  }

 private:
  double fixed_;
  std::map<std::string, double> slowest_;
};

}  // namespace tp
