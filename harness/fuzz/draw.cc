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
// Of the widest tensor on all ranks together; tokens give way. A night of many small cases finds
// more than one of few large ones, and 8192 columns of 32 tokens are within.
constexpr std::int64_t kMaxElements = 1 << 19;
// Of Operator::work: some milliseconds of the reference.
constexpr double kMaxWork = 1 << 20;

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

// Which tp sizes of the domain a relation can be had at: of any model shape, and of the models'.
struct Choices {
  struct OfModel {
    const Model* model;
    std::vector<int> tp_sizes;
  };
  std::vector<int> random[4];
  std::vector<OfModel> models[4];

  explicit Choices(const Domain& domain) {
    for (const int tp : domain.tp_sizes) {
      if (tp == 1) random[int(Relation::single)].push_back(tp);
      if (tp == 1) continue;
      for (const Relation r : {Relation::below, Relation::equal, Relation::above})
        random[int(r)].push_back(tp);
    }
    for (const Model& model : domain.models) {
      std::vector<int> of[4];
      for (const int tp : domain.tp_sizes) {
        if (partitionable(model.shape, tp)) continue;
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
HeadTriple draw_heads(Dice& dice, Relation relation, int tp) {
  int kv = tp;
  if (relation == Relation::below) {
    std::vector<int> divisors;
    for (int d = 1; d < tp; ++d) {
      if (tp % d == 0) divisors.push_back(d);
    }
    kv = dice.one_of(divisors);
  } else if (relation == Relation::above) {
    kv = tp * int(1 + dice.log_uniform(1, std::max(1, kMaxHeads / tp - 1)));
  } else if (relation == Relation::single) {
    kv = int(dice.log_uniform(1, kMaxHeads));
  }
  const int unit = std::max(kv, tp);
  return {unit * int(dice.log_uniform(1, std::max(1, kMaxHeads / unit))), kv, tp};
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

// `c`: with the keys before this one.
std::int64_t draw_value(Dice& dice, const Key& key, const Case& c) {
  if (!key.words.empty()) {
    std::vector<double> weights(key.weights.begin(), key.weights.end());
    weights.resize(key.words.size(), key.weights.empty() ? 1 : 0);
    for (std::size_t i = 0; key.name == "law" && i < weights.size(); ++i) {
      if (is_idle_law(key.words[i], c)) weights[i] = 0;
    }
    return key.min + std::int64_t(dice.weighted(weights));
  }
  const std::int64_t max = key.draw_max > 0 ? key.draw_max : key.max;
  // Small seeds are no simpler than large ones.
  if (key.name == "seed") return key.min + dice.below(max - key.min + 1);
  return dice.log_uniform(key.min, max);
}

// Elements of one token's widest row on all ranks: cut by head, or held whole by each of them.
std::int64_t elements_of_token(const Operator& op, const Case& c) {
  const std::int64_t heads = std::int64_t{c.model.num_heads} * c.model.head_dim;
  if (has_heads(op)) return std::max<std::int64_t>(c.model.hidden_size, heads);
  return std::max<std::int64_t>(c.model.hidden_size, 1) * c.tp_size;
}

bool is_model_key(const Key& key) {
  static const Case none;
  Case touched;
  if (!key.set_field) return key.of_model;
  key.set(touched, key.max);
  return touched.model != none.model;
}

// Whether the operator's keys take this model's shape.
bool fits(const Operator& op, const Model& model) {
  Case c = op.blank();
  set_model(c, model);
  return std::all_of(op.keys.begin(), op.keys.end(), [&](const Key& key) {
    return !is_model_key(key) || (key.min <= key.get(c) && key.get(c) <= key.max);
  });
}

void draw_shape(Dice& dice, const Domain& domain, const Choices& choices, const Operator& op,
                Case& c) {
  const bool heads = has_heads(op);
  if (domain.models_only || dice.unit() < 0.5) {
    const Relation relation = draw_relation(dice, choices.models);
    std::vector<Choices::OfModel> fitting = choices.models[int(relation)];
    std::erase_if(fitting, [&](const auto& of) { return !fits(op, *of.model); });
    if (!fitting.empty()) {
      const Choices::OfModel& choice = dice.one_of(fitting);
      set_model(c, *choice.model);
      if (op.key("tp_size")) c.tp_size = dice.size_from(choice.tp_sizes);
      return;
    }
  }
  if (heads) {
    const Relation relation = draw_relation(dice, choices.random);
    set_heads(c, draw_heads(dice, relation, dice.size_from(choices.random[int(relation)])));
  } else if (op.key("tp_size")) {
    c.tp_size = dice.size_from(domain.tp_sizes);
  }
  for (const Key& key : op.keys) {
    if (!is_model_key(key)) continue;
    if (key.name == "head_dim") {
      key.set(c, draw_head_dim(dice, key));
    } else if (key.name == "hidden_size") {
      key.set(c, dice.unit() < 0.5 ? 64 * dice.log_uniform(1, 128) : dice.log_uniform(1, 8192));
    } else if (key.name == "v_head_dim") {
      key.set(c, dice.unit() < 0.8 ? 0 : draw_head_dim(dice, key));
    } else if (key.of_model) {
      key.set(c, draw_value(dice, key, c));
    }
  }
}

// Halves the largest of the sizes until the case is light enough, or nothing is left to halve.
void make_lighter(const Operator& op, Case& c) {
  while (op.work && op.work(c) > kMaxWork) {
    const Key* largest = nullptr;
    for (const Key& key : op.keys) {
      if (!key.is_size && key.name != "num_tokens") continue;
      if (key.get(c) > key.min && (!largest || key.get(c) > largest->get(c))) largest = &key;
    }
    if (largest == nullptr) return;
    largest->set(c, std::max(largest->min, largest->get(c) / 2));
  }
}

Case draw_rest(Dice& dice, Case c) {
  const Operator& op = find_operator(c.op);
  for (const Key& key : op.keys) {
    if (is_model_key(key) || key.name == "tp_size") continue;
    Key limited = key;
    if (key.name == "num_tokens") {
      limited.draw_max =
          std::clamp<std::int64_t>(kMaxElements / elements_of_token(op, c), 1, key.draw_max);
    }
    key.set(c, draw_value(dice, limited, c));
  }
  make_lighter(op, c);
  // An option that this shape does not allow (a law about heads where there is one) gives way to
  // its default: the shape was drawn with care, and stays.
  // One alone, if that is enough.
  if (op.refuse(c)) {
    for (const Key& key : op.keys) {
      if (key.get_field) continue;
      Case other = c;
      key.set(other, key.fallback);
      if (!op.refuse(other)) return other;
    }
  }
  for (const Key& key : op.keys) {
    if (!op.refuse(c)) break;
    if (!key.get_field) key.set(c, key.fallback);
  }
  return c;
}

Case draw_case(Dice& dice, const Domain& domain, const Choices& choices) {
  const Operator& op = *dice.one_of(domain.ops);
  Case c = op.blank();
  draw_shape(dice, domain, choices, op, c);
  return draw_rest(dice, c);
}

}  // namespace

struct Draw::State {
  Domain domain;
  Choices choices;
  rc::Random random;
  rc::Gen<Case> gen;

  State(const Domain& d, std::uint64_t seed)
      : domain(d), choices(domain), random(seed), gen([this](const rc::Random& r, int) {
          Dice dice{r};
          return rc::shrinkable::just(draw_case(dice, domain, choices));
        }) {}
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
