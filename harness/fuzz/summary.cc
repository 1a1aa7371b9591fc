#include "harness/fuzz/summary.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <tuple>
#include <vector>

namespace tp {

namespace {

template <typename Map, typename Name>
std::string counts(const Map& map, Name name) {
  std::vector<std::string> parts;
  for (const auto& [key, count] : map) parts.push_back(fmt::format("{} {}", name(key), count));
  return fmt::format("{}", fmt::join(parts, ", "));
}

std::string mix_text(const Summary& s) {
  return fmt::format("kv_heads below tp_size {:.0f}%, at {:.0f}%, above {:.0f}%; tp_size=1 {:.0f}%",
                     100 * s.share(Relation::below), 100 * s.share(Relation::equal),
                     100 * s.share(Relation::above), 100 * s.share(Relation::single));
}

// What decides how long a kernel takes, rather than what it computes.
bool same_shape(const Case& a, const Case& b) {
  return std::tie(a.op, a.model, a.tp_size, a.num_tokens, a.dtype) ==
         std::tie(b.op, b.model, b.tp_size, b.num_tokens, b.dtype);
}

constexpr double kClassWidth = 0.01;  // of a ratio's logarithm

// Sorts by ratio and drops what is too many.
void keep_slowest(std::vector<FloorRatios::Timed>& timed) {
  std::stable_sort(timed.begin(), timed.end(),
                   [](const auto& a, const auto& b) { return a.ratio() > b.ratio(); });
  if (timed.size() > FloorRatios::kKept) timed.resize(FloorRatios::kKept);
}

std::string timings_text(const Summary& s) {
  std::vector<std::string> medians;
  for (const auto& [op, ratios] : s.ratios) {
    medians.push_back(fmt::format("{} x{:.3g} ({})", op, ratios.median(), ratios.count()));
  }
  std::string text = fmt::format("  time/floor, median (cases)   {}\n", fmt::join(medians, ", "));
  for (const FloorRatios::Timed& timed : s.slowest()) {
    text += fmt::format("  slowest     {}: {}\n", timing_text(timed.timing), to_line(timed.c));
  }
  return text;
}

}  // namespace

void FloorRatios::add(const Case& c, const Timing& timing) {
  const Timed timed{c, timing};
  ++count_;
  ++classes_[int(std::floor(std::log(timed.ratio()) / kClassWidth))];
  const auto same = std::find_if(slowest_.begin(), slowest_.end(),
                                 [&](const Timed& other) { return same_shape(c, other.c); });
  if (same == slowest_.end()) {
    slowest_.push_back(timed);
  } else if (timed.ratio() > same->ratio()) {
    *same = timed;
  }
  keep_slowest(slowest_);
}

double FloorRatios::median() const {
  std::int64_t below = 0;
  for (const auto& [number, count] : classes_) {
    below += count;
    if (2 * below >= count_) return std::exp((number + 0.5) * kClassWidth);
  }
  return 0;
}

void Summary::add(const Case& c, const Verdict& verdict) {
  ++outcomes[verdict.outcome];
  threads += verdict.threads;
  if (verdict.outcome >= Outcome::Refused) {
    reasons.try_emplace(verdict.outcome, verdict.detail);
    return;
  }
  const Operator& op = find_operator(c.op);
  ++ops[c.op];
  on_checkpoint += tp::on_checkpoint(c);
  if (has_heads(op)) ++relations[relation_of(heads_of(c))];
  if (op.key("dtype")) ++dtypes[c.dtype];
  if (op.key("fill")) ++fills[c.fill];
  if (verdict.outcome == Outcome::Pass) {
    double& score = scores[{c.op, c.dtype}];
    score = std::max(score, verdict.score);
    const Timing& t = verdict.timing;
    // A kernel of no work, or a clock that saw nothing, has no ratio.
    if (t.measured() && t.floor_us > 0 && t.kernel_us > 0) ratios[c.op].add(c, t);
  }
}

std::int64_t Summary::count(Outcome outcome) const {
  const auto it = outcomes.find(outcome);
  return it == outcomes.end() ? 0 : it->second;
}

std::int64_t Summary::ran() const {
  std::int64_t n = 0;
  for (const auto& [outcome, count] : outcomes) n += outcome < Outcome::Refused ? count : 0;
  return n;
}

double Summary::share(Relation relation) const {
  std::int64_t all = 0;
  for (const auto& [r, count] : relations) all += count;
  const auto it = relations.find(relation);
  return it == relations.end() ? 0 : double(it->second) / double(all);
}

std::vector<FloorRatios::Timed> Summary::slowest() const {
  std::vector<FloorRatios::Timed> all;
  for (const auto& [op, of_op] : ratios) {
    all.insert(all.end(), of_op.slowest().begin(), of_op.slowest().end());
  }
  keep_slowest(all);
  return all;
}

std::string summary_text(const Summary& s) {
  // A GPU's threads are not counted.
  const std::string emulated =
      s.threads > 0 && s.seconds > 0
          ? fmt::format(", {:.3g} emulated threads/s", double(s.threads) / s.seconds)
          : "";
  std::string text = fmt::format("{} cases in {:.1f} s, {:.1f} cases/s{}, seed {}\n", s.ran(),
                                 s.seconds, s.cases_per_second(), emulated, s.seed);
  if (!s.relations.empty()) text += fmt::format("  mix         {}\n", mix_text(s));
  if (s.pairs_legal >= 0) {
    text += fmt::format(
        "  pairs       {} of {} of model and tp_size, {} more refused: the KV heads do not fit\n",
        s.pairs_done, s.pairs_legal, s.pairs_refused);
  }
  text +=
      fmt::format("  covered     {}\n", counts(s.ops, [](const std::string& op) { return op; }));
  text +=
      fmt::format("              {}; {}\n", counts(s.dtypes, [](DType t) { return name_of(t); }),
                  counts(s.fills, [](Fill f) { return kFillWords[std::size_t(f)]; }));
  if (s.on_checkpoint > 0) {
    text += fmt::format("  {:<10}  {} of {} cases ran on its tensors\n",
                        s.of_adapter ? "adapter" : "checkpoint", s.on_checkpoint, s.ran());
  }
  text += fmt::format("  outcomes    {}", counts(s.outcomes, [](Outcome o) { return name_of(o); }));
  if (s.count(Outcome::Mistrusted) > 0) text += " (Mistrusted: drawn again, no pass)";
  if (s.repeated > 0) text += fmt::format("; {} like an earlier finding", s.repeated);
  if (s.unstable > 0)
    text += fmt::format("; {} failures not shown by their own replay", s.unstable);
  if (s.not_replayed > 0) text += fmt::format("; {} failures not replayed", s.not_replayed);
  text += "\n";
  for (const auto& [outcome, reason] : s.reasons) {
    std::string name(name_of(outcome));
    name[0] = char(std::tolower(name[0]));
    text += fmt::format("  {:<10}  {}\n", name, reason);
  }
  std::vector<std::string> scores;
  for (const auto& [key, score] : s.scores) {
    scores.push_back(fmt::format("{} {} {:.3f}", key.first, name_of(key.second), score));
  }
  text += fmt::format("  error/budget, largest   {}\n", fmt::join(scores, ", "));
  if (!s.ratios.empty()) text += timings_text(s);
  return text;
}

std::string progress_text(const Summary& s) {
  const std::int64_t findings = std::int64_t(s.ran() - s.count(Outcome::Pass));
  return fmt::format("[{:02}:{:02}] {} cases  {:.0f}/s  kv<tp {:.0f}%  kv=tp {:.0f}%  {} failed",
                     int(s.seconds) / 60, int(s.seconds) % 60, s.ran(), s.cases_per_second(),
                     100 * s.share(Relation::below), 100 * s.share(Relation::equal), findings);
}

}  // namespace tp
