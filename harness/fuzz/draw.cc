#include "harness/fuzz/draw.h"

#include <rapidcheck.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>

#include "harness/base/check.h"
#include "harness/fuzz/shrink.h"

namespace tp {

namespace {

constexpr int kMaxHeads = 128;
// Where room is needed for sizes: of half of the shapes that are no model's, and of large cases.
constexpr int kFewHeads = 8;
// Of heads whose width is none of the operator's sizes, in large cases.
constexpr std::int64_t kNarrowHead = 32;
// Of the widest tensor on all ranks together; tokens give way. A night of many small cases finds
// more than one of few large ones, and 8192 columns of 32 tokens are within.
constexpr std::int64_t kMaxElements = 1 << 18;
// Of Operator::work: some milliseconds of the reference. Most cases get between a quarter of this
// and all of it, log-uniformly, which pays for the few large ones.
constexpr double kMaxWork = 1 << 20;
constexpr double kLeastShare = 1.0 / 4;
// Large cases get 6 to 20 times as much: long contexts, many tiles, many tokens.
constexpr double kLargeCases = 0.04;
constexpr double kLargeShare = 6, kMaxLargeShare = 20;
// Of an operator that reads the user's checkpoint; the others are drawn as ever.
constexpr double kOnCheckpoint = 0.8;

// How often num_kv_heads is single, below, equal, above (the order of Relation). Replicated KV
// heads, those below tp_size, are where the bugs are; a single rank has nothing to shard.
constexpr double kRelationWeights[] = {12, 46, 16, 26};
static_assert(int(Relation::below) == 1 && int(Relation::above) == 3);

// Draws of one case, from one random number generator.
struct Dice {
  rc::Random random;

  double unit() { return double(random.next() >> 11) * 0x1p-53; }
  std::int64_t below(std::int64_t n) { return std::min(std::int64_t(unit() * double(n)), n - 1); }
  std::int64_t log_uniform(std::int64_t min, std::int64_t max) {
    const std::int64_t n = max - min + 1;
    return min + std::min(std::int64_t(std::exp(unit() * std::log(double(n) + 1))), n) - 1;
  }
  double log_between(double min, double max) { return min * std::pow(max / min, unit()); }
  std::size_t weighted(std::span<const double> weights) {
    double at = unit() * std::accumulate(weights.begin(), weights.end(), 0.0);
    std::size_t last = 0;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      if (weights[i] <= 0) continue;
      last = i;
      if ((at -= weights[i]) < 0) break;
    }
    return last;
  }
  template <typename T>
  const T& one_of(const std::vector<T>& all) {
    return all[std::size_t(below(std::int64_t(all.size())))];
  }
  // One of a list of sizes, as if drawn log-uniformly.
  int size_from(const std::vector<int>& sizes) {
    std::vector<double> weights;
    for (const int s : sizes) weights.push_back(std::log(1 + 1.0 / s));
    return sizes[weighted(weights)];
  }
};

bool is_model_key(const Key& key) {
  static const Case none;
  Case touched;
  if (!key.set_field) return key.of_model;
  key.set(touched, key.max);
  return touched.model != none.model;
}

// Whether the operator's keys take this model's shape.
bool fits(const Operator& op, const Model& model, int tp_size) {
  Case c = op.blank();
  c.tp_size = tp_size;
  set_model(c, model);
  return std::all_of(op.keys.begin(), op.keys.end(), [&](const Key& key) {
    return !is_model_key(key) || (key.min <= key.get(c) && key.get(c) <= key.max);
  });
}

// Which tp sizes of the domain a relation can be had at: of any model shape, and of the models that
// the operator takes.
struct Choices {
  struct OfModel {
    const Model* model;
    std::vector<int> tp_sizes;
  };
  std::vector<int> random[4];
  std::vector<OfModel> models[4];

  Choices(const Domain& domain, const Operator& op) {
    for (const int tp : domain.tp_sizes) {
      if (tp == 1) random[int(Relation::single)].push_back(tp);
      if (tp == 1) continue;
      for (const Relation r : {Relation::below, Relation::equal, Relation::above})
        random[int(r)].push_back(tp);
    }
    for (const Model& model : domain.models) {
      std::vector<int> of[4];
      for (const int tp : domain.tp_sizes) {
        if (partitionable(model.shape, tp) || !fits(op, model, tp)) continue;
        of[int(relation_of({model.shape.num_heads, model.shape.num_kv_heads, tp}))].push_back(tp);
      }
      for (int r = 0; r < 4; ++r) {
        if (!of[r].empty()) models[r].push_back({&model, of[r]});
      }
    }
  }
};

template <typename List>
Relation draw_relation(Dice& dice, const List (&possible)[4]) {
  double weights[4];
  for (int r = 0; r < 4; ++r) weights[r] = possible[r].empty() ? 0 : kRelationWeights[r];
  return Relation(dice.weighted(weights));
}

// Heads are drawn as multiples of what they must be multiples of: if tp_size and num_kv_heads
// divide one another, the larger one.
HeadTriple draw_heads(Dice& dice, Relation relation, int tp, int max_heads) {
  int kv = tp;
  if (relation == Relation::below) {
    std::vector<int> divisors;
    for (int d = 1; d < tp; ++d) {
      if (tp % d == 0) divisors.push_back(d);
    }
    kv = dice.one_of(divisors);
  } else if (relation == Relation::above) {
    kv = tp * int(1 + dice.log_uniform(1, std::max(1, max_heads / tp - 1)));
  } else if (relation == Relation::single) {
    kv = int(dice.log_uniform(1, max_heads));
  }
  const int unit = std::max(kv, tp);
  return {unit * int(dice.log_uniform(1, std::max(1, max_heads / unit))), kv, tp};
}

std::int64_t draw_head_dim(Dice& dice, const Key& key) {
  static const std::vector<int> powers = {8, 16, 32, 64, 128, 256};
  static const std::vector<int> odd = {1, 2, 3, 5, 12, 24, 40, 72, 80, 96, 112, 160, 192};
  return std::clamp<std::int64_t>(dice.one_of(dice.unit() < 0.6 ? powers : odd), key.min, key.max);
}

// Whether this law compares the case with itself.
bool is_idle_law(const std::string& law, const Case& c) {
  return (law == "tokens" && c.num_tokens == 1) || (law == "tp1" && c.tp_size == 1);
}

// Where a drawn case would be too much work, these give way.
bool is_size(const Key& key) { return key.is_size || key.name == "num_tokens"; }

// `c`: with the keys before this one.
std::int64_t draw_value(Dice& dice, const Key& key, const Case& c, bool large) {
  if (!key.words.empty()) {
    std::vector<double> weights(key.weights.begin(), key.weights.end());
    weights.resize(key.words.size(), key.weights.empty() ? 1 : 0);
    for (std::size_t i = 0; key.name == "law" && i < weights.size(); ++i) {
      if (is_idle_law(key.words[i], c)) weights[i] = 0;
    }
    for (std::size_t i = 0; key.fits && i < weights.size(); ++i) {
      if (!key.fits(c, key.min + std::int64_t(i))) weights[i] = 0;
    }
    if (std::all_of(weights.begin(), weights.end(), [](double w) { return w == 0; }))
      return key.fallback;
    return key.min + std::int64_t(dice.weighted(weights));
  }
  if (key.fits && !key.fits(c, key.max)) return key.fallback;
  const std::int64_t max = key.draw_max > 0 ? key.draw_max : key.max;
  // Small seeds are no simpler than large ones.
  if (key.name == "seed") return key.min + dice.below(max - key.min + 1);
  if (large && key.large_max > 0) return max + 1 + dice.below(key.large_max - max);
  if (large && is_size(key)) return key.min + dice.below(max - key.min + 1);
  if (key.grain > 1 && dice.unit() < 0.5) {
    return key.grain * dice.log_uniform((key.min + key.grain - 1) / key.grain, max / key.grain);
  }
  return dice.log_uniform(key.min, max);
}

// Elements of one token's widest row on all ranks: cut by head, or held whole by each of them.
std::int64_t elements_of_token(const Operator& op, const Case& c) {
  const std::int64_t heads = std::int64_t{c.model.num_heads} * c.model.head_dim;
  if (has_heads(op)) return std::max<std::int64_t>(c.model.hidden_size, heads);
  return std::max<std::int64_t>(c.model.hidden_size, 1) * c.tp_size;
}

bool has_wide_shape(const Operator& op) {
  return std::any_of(op.keys.begin(), op.keys.end(),
                     [](const Key& key) { return key.is_size && is_model_key(key); });
}

// Heads of a shape that is no model's: few where wide layers or long contexts need the room.
void draw_triple(Dice& dice, const Choices& choices, const Operator& op, Case& c, bool large) {
  const bool few = large || (has_wide_shape(op) && dice.unit() < 0.5);
  const Relation relation = draw_relation(dice, choices.random);
  const int tp_size = dice.size_from(choices.random[int(relation)]);
  set_heads(c, draw_heads(dice, relation, tp_size, few ? kFewHeads : kMaxHeads));
}

void draw_shape(Dice& dice, const Domain& domain, const Choices& choices, const Operator& op,
                Case& c, bool large) {
  if (domain.models_only || (!large && dice.unit() < 0.5)) {
    const Relation relation = draw_relation(dice, choices.models);
    if (const auto& fitting = choices.models[int(relation)]; !fitting.empty()) {
      const Choices::OfModel& choice = dice.one_of(fitting);
      if (op.key("tp_size")) c.tp_size = dice.size_from(choice.tp_sizes);
      set_model(c, *choice.model);
      return;
    }
  }
  if (has_heads(op)) {
    draw_triple(dice, choices, op, c, large);
  } else if (op.key("tp_size")) {
    c.tp_size = dice.size_from(domain.tp_sizes);
  }
  for (const Key& key : op.keys) {
    if (!is_model_key(key)) continue;
    if (key.name == "head_dim" || key.name == "v_head_dim") {
      Key limited = key;
      if (large && !key.is_size) limited.max = std::min(key.max, kNarrowHead);
      const bool as_head_dim = key.name == "v_head_dim" && dice.unit() < 0.8;
      key.set(c, as_head_dim ? 0 : draw_head_dim(dice, limited));
    } else if (key.name == "hidden_size") {
      key.set(c, dice.unit() < 0.5 ? 64 * dice.log_uniform(1, 128) : dice.log_uniform(1, 8192));
    } else if (key.of_model) {
      key.set(c, draw_value(dice, key, c, large));
    }
  }
}

// The largest number up to `most` that is a multiple of 8 if `most` is: rows that are aligned stay
// so.
std::int64_t as_aligned(std::int64_t number, std::int64_t most) {
  return most % 8 == 0 && number >= 8 ? number / 8 * 8 : number;
}

// The largest value up to `most`, but no less than it is, that keeps the work within `budget`.
void grow(const Operator& op, Case& c, const Key& key, std::int64_t most, double budget) {
  std::int64_t least = key.get(c), too_much = most + 1;
  while (too_much - least > 1) {
    const std::int64_t middle = least + (too_much - least) / 2;
    key.set(c, as_aligned(middle, most));
    (op.work(c) <= budget ? least : too_much) = middle;
  }
  key.set(c, as_aligned(least, most));
}

// Cuts `sizes` down until the case is no more work than `budget`, if it can be: all but the first
// start small and take what room the ones before them left, so that who comes first is a large one.
void share_out(Dice& dice, const Operator& op, Case& c, const std::vector<const Key*>& sizes,
               double budget) {
  if (op.work(c) <= budget) return;
  const std::int64_t start = 16 >> dice.below(5);
  std::vector<std::int64_t> drawn;
  for (const Key* key : sizes) drawn.push_back(key->get(c));
  for (std::int64_t small = start; small > 0; small /= 2) {
    for (std::size_t i = 0; i < sizes.size(); ++i)
      sizes[i]->set(c, std::min(drawn[i], std::max(small, sizes[i]->min)));
    if (op.work(c) <= budget) break;
  }
  const double room = std::max(budget, op.work(c));
  for (std::size_t i = 0; i < sizes.size(); ++i) grow(op, c, *sizes[i], drawn[i], room);
}

// The keys that are not of the shape.
void draw_others(Dice& dice, const Operator& op, Case& c, bool large) {
  for (const Key& key : op.keys) {
    if (is_model_key(key) || key.name == "tp_size" || !key.is_drawn) continue;
    if (key.of_checkpoint && on_checkpoint(c)) continue;
    Key limited = key;
    if (key.name == "num_tokens" && !op.work) {
      limited.draw_max =
          std::clamp<std::int64_t>(kMaxElements / elements_of_token(op, c), 1, key.draw_max);
    }
    key.set(c, draw_value(dice, limited, c, large));
  }
}

// An option that this shape does not allow (a law about heads where there is one) gives way to its
// default: the shape was drawn with care, and stays. One option alone, if that is enough.
Case with_legal_options(const Operator& op, Case c) {
  if (!op.refuse(c)) return c;
  const auto gives_way = [&](const Key& key) {
    return !key.get_field && !(key.of_checkpoint && on_checkpoint(c));
  };
  for (const Key& key : op.keys) {
    if (!gives_way(key)) continue;
    Case other = c;
    key.set(other, key.fallback);
    if (!op.refuse(other)) return other;
  }
  for (const Key& key : op.keys) {
    if (!op.refuse(c)) break;
    if (gives_way(key)) key.set(c, key.fallback);
  }
  return c;
}

// The sizes that may give way, in the order in which they get room: any; in a large case those that
// make it one come first.
std::vector<const Key*> sizes_in_order(Dice& dice, const Operator& op, bool of_shape, bool large) {
  std::vector<const Key*> sizes;
  for (const Key& key : op.keys) {
    if (is_size(key) && (of_shape || !is_model_key(key))) sizes.push_back(&key);
  }
  for (std::size_t i = sizes.size(); i > 1; --i)
    std::swap(sizes[i - 1], sizes[std::size_t(dice.below(std::int64_t(i)))]);
  if (large) {
    std::stable_partition(sizes.begin(), sizes.end(),
                          [](const Key* key) { return key->large_max > 0; });
  }
  return sizes;
}

// A case whose shape stays as it is: the least work that this is, twice over, may be more than
// others get.
Case draw_rest(Dice& dice, Case c) {
  const Operator& op = find_operator(c.op);
  draw_others(dice, op, c, false);
  if (op.work) {
    const auto sizes = sizes_in_order(dice, op, false, false);
    Case least = c;
    for (const Key* key : sizes) key->set(least, key->min);
    share_out(dice, op, c, sizes, std::max(kMaxWork, 2 * op.work(least)));
  }
  return with_legal_options(op, c);
}

// One of the cases on the checkpoint's tensors: the tp_size as ever, then any layer.
Case draw_own(Dice& dice, const std::map<int, std::vector<Case>>& own) {
  std::vector<int> tp_sizes[4];
  for (const auto& [tp, cases] : own) {
    const bool heads = has_heads(find_operator(cases.front().op));
    tp_sizes[heads ? int(relation_of(heads_of(cases.front()))) : 0].push_back(tp);
  }
  const Relation relation = draw_relation(dice, tp_sizes);
  return draw_rest(dice, dice.one_of(own.at(dice.size_from(tp_sizes[int(relation)]))));
}

Case draw_case(Dice& dice, const Domain& domain, const std::vector<Choices>& choices) {
  const auto which = std::size_t(dice.below(std::int64_t(domain.ops.size())));
  const Operator& op = *domain.ops[which];
  if (!domain.on_checkpoint.empty() && !domain.on_checkpoint[which].empty() &&
      dice.unit() < kOnCheckpoint)
    return draw_own(dice, domain.on_checkpoint[which]);
  const bool large = op.work && dice.unit() < kLargeCases;
  Case c = op.blank();
  draw_shape(dice, domain, choices[which], op, c, large);
  draw_others(dice, op, c, large);
  if (op.work) {
    const double share =
        large ? dice.log_between(kLargeShare, kMaxLargeShare) : dice.log_between(kLeastShare, 1);
    share_out(dice, op, c, sizes_in_order(dice, op, true, large), share * kMaxWork);
  }
  return with_legal_options(op, c);
}

}  // namespace

struct Draw::State {
  Domain domain;
  std::vector<Choices> choices;  // of each operator
  rc::Random random;
  rc::Gen<Case> gen;

  State(const Domain& d, std::uint64_t seed)
      : domain(d), random(seed), gen([this](const rc::Random& r, int) {
          Dice dice{r};
          return rc::shrinkable::just(draw_case(dice, domain, choices));
        }) {
    for (const Operator* op : domain.ops) choices.emplace_back(domain, *op);
  }
};

Draw::Draw(const Domain& domain, std::uint64_t seed) : state_(new State(domain, seed)) {
  TP_CHECK(!domain.ops.empty(), "no operator to draw");
}
Draw::~Draw() = default;

Case Draw::next() { return state_->gen(state_->random.split()).value(); }

Case Draw::rest(const Case& shape) {
  Dice dice{state_->random.split()};
  return draw_rest(dice, shape);
}

struct Descent::State {
  rc::Seq<rc::Shrinkable<Case>> candidates;
  rc::Maybe<rc::Shrinkable<Case>> last;
};

Descent::Descent(const Case& failing) : state_(new State) {
  state_->candidates = rc::shrinkable::shrinkRecur(Case(failing), [](const Case& c) {
                         return rc::seq::fromContainer(shrinks(c));
                       }).shrinks();
}
Descent::~Descent() = default;

std::optional<Case> Descent::next() {
  state_->last = state_->candidates.next();
  if (!state_->last) return std::nullopt;
  return state_->last->value();
}

void Descent::accept() {
  TP_CHECK(bool(state_->last), "nothing was tried yet");
  state_->candidates = state_->last->shrinks();
}

}  // namespace tp
