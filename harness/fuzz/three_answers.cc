#include "harness/fuzz/three_answers.h"

#include <fmt/format.h>

#include <utility>

#include "harness/fuzz/both.h"
#include "harness/fuzz/shrink.h"

namespace tp {

namespace {

constexpr const char* kOneRank = "one rank with the whole problem";

bool ran(const Verdict& v) { return v.outcome == Outcome::Pass || v.finding(); }
bool same_end(const Verdict& a, const Verdict& b) {
  return a.finding() == b.finding() && (!a.finding() || same_failure(a, b));
}
// Who crashed has no bits, and is like whoever ended alike; so is who has bits of its own.
bool same_bits(const Verdict& a, const Verdict& b) {
  if (!same_end(a, b)) return false;
  if (a.own_bits || b.own_bits) return true;
  return a.digest == b.digest && (a.digest != 0 || a.outcome == b.outcome);
}

// Gpu and emulator do not agree.
std::string quarrel(const ThreeAnswers& t) {
  const bool alike = same_end(t.gpu, t.emulator);
  if (alike ? same_bits(t.one_rank, t.emulator) : same_end(t.one_rank, t.emulator))
    return "stands alone: the gpu";
  if (alike ? same_bits(t.one_rank, t.gpu) : same_end(t.one_rank, t.gpu))
    return "stands alone: the emulator";
  const bool both_fail = t.gpu.finding() && t.emulator.finding();
  const bool one_fails = t.gpu.finding() != t.emulator.finding();
  return fmt::format("no two agree: gpu and emulator {}, and {} {}",
                     both_fail   ? "fail each in its own way"
                     : one_fails ? "end differently"
                                 : "pass with different bits",
                     kOneRank,
                     same_end(t.one_rank, t.gpu) ? "agrees with neither"
                     : !t.one_rank.finding()     ? "passes"
                     : both_fail || one_fails    ? "fails otherwise"
                                                 : "fails");
}

// What comes out wrong where a rank takes what is another's. What ends a job or a launch may have
// other causes.
bool about_values(Outcome o) {
  return o == Outcome::WrongValue || o == Outcome::NotFinite || o == Outcome::OutOfBounds;
}

// Gpu and emulator agree, and not with the one rank.
const char* against_the_ranks(const ThreeAnswers& t) {
  if (!t.gpu.finding()) return "it fails where the ranks pass";
  if (t.one_rank.finding()) return "the ranks agree with each other, and it fails otherwise";
  return about_values(t.gpu.outcome)
             ? "the ranks agree with each other and not with it, which is a sharding mistake"
             : "it passes where the ranks fail";
}

std::string row(const char* name, const Verdict& v) {
  return fmt::format("  {:<31}  {:<18}  digest {:016x}  error/budget {:.3f}{}{}\n", name,
                     name_of(v.outcome), v.digest, v.score, v.detail.empty() ? "" : "  ", v.detail);
}

}  // namespace

Verdict overall(const ThreeAnswers& t) {
  Verdict v = merged(t.gpu, t.emulator);
  if (!v.finding() && t.one_rank.finding()) {
    v = t.one_rank;
    v.detail = fmt::format("on {} only: {}", kOneRank, t.one_rank.detail);
  }
  return v;
}

std::string stands_alone(const ThreeAnswers& t) {
  for (const auto& [name, v] : {std::pair("the gpu", &t.gpu), {"the emulator", &t.emulator}}) {
    if (!ran(*v)) return fmt::format("nothing to compare: {} says {}", name, name_of(v->outcome));
  }
  const bool agree = same_bits(t.gpu, t.emulator);
  if (!ran(t.one_rank)) {
    return fmt::format("gpu and emulator {}; {} says {}", agree ? "agree" : "do not agree",
                       kOneRank, name_of(t.one_rank.outcome));
  }
  if (!agree) return quarrel(t);
  if (same_end(t.one_rank, t.gpu)) {
    return t.gpu.finding() ? "all three agree: neither the gpu nor the sharding makes it fail"
                           : "all three agree";
  }
  return fmt::format("stands alone: {}: {}", kOneRank, against_the_ranks(t));
}

std::string three_answers_text(const ThreeAnswers& t) {
  return row("gpu", t.gpu) + row("emulator", t.emulator) + row(kOneRank, t.one_rank) +
         fmt::format("  {}\n", stands_alone(t));
}

}  // namespace tp
