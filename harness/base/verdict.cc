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

constexpr std::string_view kOwnBits = " own_bits";

// The part of a verdict line that is only there where something was measured. Bytes and flops are
// counts: every digit of them travels.
std::string timing_words(const Timing& t) {
  if (!t.measured()) return "";
  return fmt::format(
      " slowest_rank={} kernel_us={:.6g} collective_us={:.6g} floor_us={:.6g} bytes={} flops={}",
      t.slowest_rank, t.kernel_us, t.collective_us, t.floor_us, t.bytes, t.flops);
}

// Whether `words` is what timing_words makes, or empty.
bool read_timing(const char* words, Timing& t) {
  if (*words == 0) return true;
  int end = -1;
  std::sscanf(
      words, " slowest_rank=%d kernel_us=%lg collective_us=%lg floor_us=%lg bytes=%lg flops=%lg%n",
      &t.slowest_rank, &t.kernel_us, &t.collective_us, &t.floor_us, &t.bytes, &t.flops, &end);
  return end > 0 && words[end] == 0 && t.measured();
}

}  // namespace

std::string_view name_of(Outcome outcome) { return kNames[std::size_t(outcome)]; }

std::string timing_text(const Timing& t) {
  if (!t.measured()) return "";
  const std::string ratio =
      t.floor_us > 0
          ? fmt::format("x{:.3g} of its floor of {:.3g} us: ", t.kernel_us / t.floor_us, t.floor_us)
          : "";
  const std::string collectives =
      t.collective_us > 0 ? fmt::format(", collectives {:.4g} us", t.collective_us) : "";
  return fmt::format("{}kernels {:.4g} us on tp_rank {}{}", ratio, t.kernel_us, t.slowest_rank,
                     collectives);
}

std::string to_line(const Verdict& v) {
  std::string detail = v.detail;
  std::replace(detail.begin(), detail.end(), '\n', ' ');
  return fmt::format("{} digest={:016x} score={:.6g} threads={} seconds={:.6g}{}{} | {}",
                     name_of(v.outcome), v.digest, v.score, v.threads, v.seconds,
                     v.own_bits ? kOwnBits : "", timing_words(v.timing), detail);
}

Verdict verdict_from_line(std::string_view line) {
  Verdict v;
  const std::size_t bar = line.find(" | ");
  const std::string head(line.substr(0, bar));
  char name[32] = {};
  unsigned long long digest = 0, threads = 0;
  int end = 0;
  const bool ok = bar != std::string_view::npos &&
                  std::sscanf(head.c_str(), "%31s digest=%llx score=%lg threads=%llu seconds=%lg%n",
                              name, &digest, &v.score, &threads, &v.seconds, &end) == 5;
  const char* rest = head.c_str() + end;
  v.own_bits = std::string_view(rest).starts_with(kOwnBits);
  if (v.own_bits) rest += kOwnBits.size();
  const auto it = std::find(kNames.begin(), kNames.end(), std::string_view(name));
  if (!ok || it == kNames.end() || !read_timing(rest, v.timing))
    throw BadInput(fmt::format("not a verdict line: '{}'", line));
  v.outcome = Outcome(it - kNames.begin());
  v.digest = digest;
  v.threads = threads;
  v.detail = line.substr(bar + 3);
  return v;
}

}  // namespace tp
