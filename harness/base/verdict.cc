#include "harness/base/verdict.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdio>

#include "harness/base/check.h"

namespace tp {

namespace {

constexpr std::array<std::string_view, 16> kNames = {
    "Pass",          "WrongValue",  "NotFinite",     "ReplicaMismatch",
    "Uninitialised", "OutOfBounds", "InputModified", "CollectiveMismatch",
    "BadLaunch",     "LawBroken",   "Crash",         "Hang",
    "OutOfMemory",   "Refused",     "Mistrusted",    "Skipped"};

}  // namespace

std::string_view name_of(Outcome outcome) { return kNames[std::size_t(outcome)]; }

std::string to_line(const Verdict& v) {
  std::string detail = v.detail;
  std::replace(detail.begin(), detail.end(), '\n', ' ');
  return fmt::format("{} digest={:016x} score={:.6g} threads={} seconds={:.6g} | {}",
                     name_of(v.outcome), v.digest, v.score, v.threads, v.seconds, detail);
}

Verdict verdict_from_line(std::string_view line) {
  Verdict v;
  const std::size_t bar = line.find(" | ");
  const std::string head(line.substr(0, bar));
  char name[32] = {};
  unsigned long long digest = 0, threads = 0;
  const bool ok = bar != std::string_view::npos &&
                  std::sscanf(head.c_str(), "%31s digest=%llx score=%lg threads=%llu seconds=%lg",
                              name, &digest, &v.score, &threads, &v.seconds) == 5;
  const auto it = std::find(kNames.begin(), kNames.end(), std::string_view(name));
  if (!ok || it == kNames.end()) throw BadInput(fmt::format("not a verdict line: '{}'", line));
  v.outcome = Outcome(it - kNames.begin());
  v.digest = digest;
  v.threads = threads;
  v.detail = line.substr(bar + 3);
  return v;
}

}  // namespace tp
