#include "harness/fuzz/shrink.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <optional>
#include <set>
#include <tuple>

#include "harness/fuzz/domain.h"
#include "harness/fuzz/draw.h"

namespace tp {

namespace {

bool fits_below(const HeadTriple& a, const HeadTriple& b) {
  return a != b && a.num_heads <= b.num_heads && a.num_kv_heads <= b.num_kv_heads &&
         a.tp_size <= b.tp_size;
}

// The smallest legal triples below t: those of its own relation first, because most bugs need it,
// then by tp_size. At most `limit` of them.
std::vector<HeadTriple> smallest_triples(const HeadTriple& t, std::size_t limit) {
  std::vector<HeadTriple> own, others;
  for (int tp = 1; tp <= t.tp_size && own.size() < limit; ++tp) {
    for (int kv = 1; kv <= std::min(2 * tp, t.num_kv_heads); ++kv) {
      for (int heads = std::max(kv, tp); heads <= 2 * std::max(kv, tp); heads += std::max(kv, tp)) {
        const HeadTriple candidate{heads, kv, tp};
        if (!is_legal(candidate) || !fits_below(candidate, t)) continue;
        (relation_of(candidate) == relation_of(t) ? own : others).push_back(candidate);
      }
    }
  }
  const auto order = [](const HeadTriple& a, const HeadTriple& b) {
    return std::tie(a.tp_size, a.num_heads, a.num_kv_heads) <
           std::tie(b.tp_size, b.num_heads, b.num_kv_heads);
  };
  std::sort(own.begin(), own.end(), order);
  std::sort(others.begin(), others.end(), order);
  own.insert(own.end(), others.begin(),
             others.begin() + std::ptrdiff_t(std::min<std::size_t>(others.size(), 6)));
  if (own.size() > limit) own.resize(limit);
  return own;
}

// Halves and single steps, of one number or of several at once.
std::vector<HeadTriple> nearby_triples(const HeadTriple& t) {
  const int heads = t.num_heads, kv = t.num_kv_heads, tp = t.tp_size;
  std::vector<HeadTriple> all = {{heads / 2, kv / 2, tp / 2}, {heads / 2, kv, tp / 2},
                                 {heads, kv / 2, tp / 2},     {heads, kv, tp / 2},
                                 {heads / 2, kv / 2, tp},     {heads / 2, kv, tp},
                                 {heads, kv / 2, tp}};
  const auto step = [&](auto change) {
    for (int by = 1; by < 16; ++by) {
      const HeadTriple next = change(by);
      if (next.num_heads < 1 || next.num_kv_heads < 1 || next.tp_size < 1) return;
      if (is_legal(next)) {
        all.push_back(next);
        return;
      }
    }
  };
  step([&](int by) { return HeadTriple{heads - by * std::max(kv, tp), kv, tp}; });
  step([&](int by) { return HeadTriple{heads, kv - by, tp}; });
  step([&](int by) { return HeadTriple{heads, kv, tp - by}; });
  std::erase_if(all, [&](const HeadTriple& c) { return !fits_below(c, t) || !is_legal(c); });
  return all;
}

// Candidates for one case, each once and only if it is legal.
class Candidates {
 public:
  explicit Candidates(const Case& from)
      : from_(from), op_(find_operator(from.op)), joint_(has_heads(op_)) {}

  bool shrinks_alone(const Key& key) const {
    const bool in_triple =
        key.name == "num_heads" || key.name == "num_kv_heads" || key.name == "tp_size";
    return key.shrink != Shrink::never && !(joint_ && in_triple);
  }
  std::int64_t target(const Key& key) const {
    return key.shrink == Shrink::to_min ? key.min : key.fallback;
  }
  // Every key that shrinks alone at its target; options and words are left where `numbers_only`.
  Case smallest(bool numbers_only) const {
    Case c = from_;
    for (const Key& key : op_.keys) {
      if (shrinks_alone(key) && !(numbers_only && key.shrink == Shrink::to_fallback))
        key.set(c, target(key));
    }
    return c;
  }
  void add(Case c) {
    if (on_checkpoint(from_) && !keep_tensors(c)) return;
    if (c != from_ && !op_.refuse(c) && seen_.insert(to_line(c)).second) list_.push_back(c);
  }
  void add(Case c, const HeadTriple& t) {
    set_heads(c, t);
    add(c);
  }
  void add(const Key& key, std::int64_t value) {
    Case c = from_;
    key.set(c, value);
    add(c);
  }

  const Case& from_;
  const Operator& op_;
  const bool joint_;
  std::vector<Case> list_;

 private:
  // What the files decide is of the same tensors as it was, at the candidate's tp_size; false: they
  // cannot be had there.
  bool keep_tensors(Case& c) {
    auto own = own_.find(c.tp_size);
    if (own == own_.end()) own = own_.emplace(c.tp_size, same_tensors(c.tp_size)).first;
    if (!own->second) return false;
    for (const Key& key : op_.keys) {
      if (key.of_checkpoint) key.set(c, key.get(*own->second));
    }
    return true;
  }
  std::optional<Case> same_tensors(int tp_size) const {
    for (const Case& c : cases_on_files(op_, tp_size).cases) {
      const bool same = std::all_of(op_.keys.begin(), op_.keys.end(), [&](const Key& key) {
        return key.is_drawn || key.get(c) == key.get(from_);
      });
      if (same) return c;
    }
    return std::nullopt;
  }

  std::map<int, std::optional<Case>> own_;  // by tp_size
  std::set<std::string> seen_;
};

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

std::vector<Case> shrinks(const Case& c) {
  Candidates out(c);
  const std::vector<HeadTriple> triples =
      out.joint_ ? smallest_triples(heads_of(c), 20) : std::vector<HeadTriple>{};
  // One jump to the bottom, then to the bottom in one direction at a time ...
  for (const bool numbers_only : {false, true}) {
    if (!triples.empty()) out.add(out.smallest(numbers_only), triples[0]);
  }
  if (!triples.empty()) out.add(c, triples[0]);
  for (const bool numbers_only : {false, true}) out.add(out.smallest(numbers_only));
  // ... then other small groups, with everything else already small if it can be, ...
  for (const HeadTriple& t : triples) out.add(c, t);
  if (out.joint_) {
    for (const HeadTriple& t : nearby_triples(heads_of(c))) out.add(c, t);
  }
  // ... then key by key: each to its target, then half of the way, a quarter, ...
  for (const Key& key : out.op_.keys) {
    if (out.shrinks_alone(key)) out.add(key, out.target(key));
  }
  for (const Key& key : out.op_.keys) {
    if (!out.shrinks_alone(key) || key.shrink == Shrink::to_fallback) continue;
    const std::int64_t value = key.get(c);
    for (std::int64_t gap = (value - key.min) / 2; gap > 0; gap /= 2) out.add(key, value - gap);
  }
  return out.list_;
}

std::vector<Case> sweep(const Case& c) {
  Candidates out(c);
  if (out.joint_) {
    for (const HeadTriple& t : smallest_triples(heads_of(c), 40)) out.add(c, t);
  }
  for (const Key& key : out.op_.keys) {
    if (!out.shrinks_alone(key)) continue;
    const std::int64_t value = key.get(c);
    if (key.shrink == Shrink::to_fallback) {
      if (value != key.fallback) out.add(key, key.fallback);
      continue;
    }
    for (std::int64_t v = key.min; v < std::min(value, key.min + 8); ++v) out.add(key, v);
  }
  return out.list_;
}

bool same_failure(const Verdict& a, const Verdict& b) {
  const auto ends_job = [](Outcome o) { return o == Outcome::Crash || o == Outcome::Hang; };
  if (!a.finding() || !b.finding()) return false;
  return ends_job(a.outcome) || ends_job(b.outcome) ? a.outcome == b.outcome : true;
}

Shrunk minimise(const Case& failing, const Verdict& verdict,
                const std::function<std::optional<Verdict>(const Case&)>& fails,
                const ShrinkLimits& limits) {
  const auto start = std::chrono::steady_clock::now();
  Shrunk shrunk{failing, verdict, 0};
  std::set<std::string> tried = {to_line(failing)};
  const auto in_budget = [&] {
    return shrunk.runs < limits.runs && seconds_since(start) < limits.seconds;
  };
  const auto try_case = [&](const Case& c) {
    if (!tried.insert(to_line(c)).second) return false;
    ++shrunk.runs;
    const std::optional<Verdict> v = fails(c);
    if (v) shrunk = {c, *v, shrunk.runs};
    return v.has_value();
  };

  Descent descent(failing);
  while (in_budget()) {
    const std::optional<Case> candidate = descent.next();
    if (!candidate) break;
    if (try_case(*candidate)) descent.accept();
  }
  for (bool progress = true; progress;) {
    progress = false;
    for (const Case& candidate : sweep(shrunk.smallest)) {
      if (!in_budget()) return shrunk;
      if ((progress = try_case(candidate))) break;
    }
  }
  return shrunk;
}

}  // namespace tp
