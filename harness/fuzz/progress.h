#pragma once
// How far a long command is, on standard error: rewritten in place on a terminal, a line every 30 s
// in a log.

#include <chrono>
#include <string>
#include <string_view>

namespace tp {

class Progress {
 public:
  enum class Show { yes, no };
  explicit Progress(Show show);
  ~Progress() { clear(); }

  // Whether update() would print now, so that the text need not be made otherwise.
  bool due() const;
  void update(const std::string& text);
  // Removes what was written in place, before something else is printed.
  void clear();

 private:
  using Clock = std::chrono::steady_clock;
  bool show_;
  bool in_place_;
  bool written_ = false;
  Clock::time_point next_;
};

}  // namespace tp
