#include "harness/fuzz/progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>

namespace tp {

namespace {

constexpr auto kInPlace = std::chrono::milliseconds(200);
constexpr auto kInLog = std::chrono::seconds(30);

}  // namespace

Progress::Progress(Show show)
    : show_(show == Show::yes),
      in_place_(isatty(STDERR_FILENO) == 1),
      next_(Clock::now() + (in_place_ ? Clock::duration(kInPlace) : Clock::duration(kInLog))) {}

bool Progress::due() const { return show_ && Clock::now() >= next_; }

void Progress::update(const std::string& text) {
  if (!due()) return;
  if (in_place_) {
    fmt::print(stderr, "\r\033[K{}", text);
    std::fflush(stderr);
    written_ = true;
  } else {
    fmt::print(stderr, "{}\n", text);
  }
  next_ = Clock::now() + (in_place_ ? Clock::duration(kInPlace) : Clock::duration(kInLog));
}

void Progress::clear() {
  if (!written_) return;
  fmt::print(stderr, "\r\033[K");
  std::fflush(stderr);
  written_ = false;
}

}  // namespace tp
