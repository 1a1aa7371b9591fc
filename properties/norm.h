#pragma once
// What the properties of all norms have in common: their keys and their data.

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "properties/run/stage.h"

namespace tp::norm {

inline Key eps_key() {
  return {.name = "eps",
          .help = "added to the mean square",
          .min = 0,
          .max = 1,
          .words = {"1e-6", "1e-5"}};
}

// As the kernel gets it, in fp32; scaled with the data where a law scales them.
inline double eps_of(const Case& c, const Variation& v) {
  return double(c.options.at("eps") == 0 ? 1e-6f : 1e-5f) * std::ldexp(1.0, 2 * v.scale_log2);
}

inline DataRegime regime(const Case& c, const Variation& v) {
  return {c.fill, c.seed, eps_of(c, {}), v.scale_log2, v.rotate_rows};
}

// How single heads are normed: the words of a key whose first word is something else.
constexpr std::int64_t kPerHead = 1;     // one weight of head_dim for all heads
constexpr std::int64_t kPerHead1p = 2;   // the same, multiplied as 1 + w
constexpr std::int64_t kWeightless = 3;  // no weight

inline Key head_norm_key(std::string name, std::string help, std::string first, int percent_first) {
  const int other = (100 - percent_first) / 3;
  return {.name = std::move(name),
          .help = std::move(help),
          .min = 0,
          .max = kWeightless,
          .words = {std::move(first), "per_head", "per_head_1p", "weightless"},
          .shrink = Shrink::to_fallback,
          .weights = {percent_first, other, other, other}};
}

inline bool has_head_weight(std::int64_t kind) { return kind == kPerHead || kind == kPerHead1p; }

// The mistakes with weights of single heads, of an operator whose key `key` says what they are.
inline std::vector<Mutant> head_weight_mutants(const std::string& key) {
  Mutant plain{"norm-weight-multiply-precision:1p", "a norm of the kind 1 + w multiplies with w",
               "vllm-project/vllm#42379", sharding_rules(),
               [key](const Case& c) { return c.options.at(key) == kPerHead1p; }};
  plain.rules.norm.one_plus_weight = 0;
  Mutant swapped{"qknorm-rope-partial-warp:swapped-weights",
                 "q heads take the weight of the k norm, and k heads that of the q norm",
                 "vllm-project/vllm#51049", sharding_rules(),
                 [key](const Case& c) { return has_head_weight(c.options.at(key)); }};
  std::swap(swapped.rules.norm.head_weight[0], swapped.rules.norm.head_weight[1]);
  return {plain, swapped};
}

// What the reference takes from a rank-free model, and from a mistake to see whether it would show:
// whose weight, and what is added to it.
struct HeadWeights {
  std::string of[2] = {"q_weight", "k_weight"};  // of the heads of q, of k
  double one_plus = 1;
};
inline HeadWeights head_weights(const ShardingRules& rules) {
  HeadWeights taken{.one_plus = rules.norm.one_plus_weight};
  for (const int which : {0, 1})
    taken.of[which] = rules.norm.head_weight[which] == 0 ? "q_weight" : "k_weight";
  return taken;
}

// Whether the altered reference leaves the budget of the right one in columns `cols` of the first
// rows, as many as `altered` has.
inline bool tells_apart(DType t, const Budget& right, const Budget& altered, Shard cols) {
  for (std::int64_t i = 0; i < altered.rows; ++i) {
    for (std::int64_t j = cols.offset; j < cols.end(); ++j) {
      const std::size_t at = std::size_t(i * right.cols + j);
      if (!accepts(t, altered.r[at], right.r[at], right.rho[at])) return true;
    }
  }
  return false;
}

inline Matrix first_row(const Matrix& m) {
  Matrix row(1, m.cols);
  std::copy_n(m.row(0), m.cols, row.row(0));
  return row;
}

}  // namespace tp::norm
