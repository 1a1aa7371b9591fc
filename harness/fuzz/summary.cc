#include "harness/fuzz/summary.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
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

}  // namespace

void Summary::add(const Case& c, const Verdict& verdict) {
  ++outcomes[verdict.outcome];
  threads += verdict.threads;
  if (verdict.outcome >= Outcome::Refused) return;
  const Operator& op = find_operator(c.op);
  ++ops[c.op];
  if (has_heads(op)) ++relations[relation_of(heads_of(c))];
  if (op.key("dtype")) ++dtypes[c.dtype];
  if (op.key("fill")) ++fills[c.fill];
  if (verdict.outcome == Outcome::Pass) {
    double& score = scores[{c.op, c.dtype}];
    score = std::max(score, verdict.score);
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

std::string summary_text(const Summary& s) {
  std::string text = fmt::format(
      "{} cases in {:.1f} s, {:.1f} cases/s, {:.3g} emulated threads/s, seed {}\n", s.ran(),
      s.seconds, s.cases_per_second(), s.seconds > 0 ? double(s.threads) / s.seconds : 0, s.seed);
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
  text += fmt::format("  outcomes    {}", counts(s.outcomes, [](Outcome o) { return name_of(o); }));
  if (s.count(Outcome::Mistrusted) > 0) text += " (Mistrusted: drawn again, no pass)";
  if (s.repeated > 0) text += fmt::format("; {} like an earlier finding", s.repeated);
  if (s.unstable > 0)
    text += fmt::format("; {} failures not shown by their own replay", s.unstable);
  if (s.not_replayed > 0) text += fmt::format("; {} failures not replayed", s.not_replayed);
  std::vector<std::string> scores;
  for (const auto& [key, score] : s.scores) {
    scores.push_back(fmt::format("{} {} {:.3f}", key.first, name_of(key.second), score));
  }
  text += fmt::format("\n  error/budget, largest   {}\n", fmt::join(scores, ", "));
  return text;
}

std::string progress_text(const Summary& s) {
  const std::int64_t findings = std::int64_t(s.ran() - s.count(Outcome::Pass));
  return fmt::format("[{:02}:{:02}] {} cases  {:.0f}/s  kv<tp {:.0f}%  kv=tp {:.0f}%  {} failed",
                     int(s.seconds) / 60, int(s.seconds) % 60, s.ran(), s.cases_per_second(),
                     100 * s.share(Relation::below), 100 * s.share(Relation::equal), findings);
}

}  // namespace tp
