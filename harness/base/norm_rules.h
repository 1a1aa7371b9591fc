#pragma once
// The named decisions of norms under tensor parallelism, for ShardingRules (vLLM's RMSNormTP and
// SGLang's after sgl-project/sglang#20967).

#include <cstdint>

#include "harness/base/shape.h"

namespace tp {

// Which values inside a norm are rounded to the type of the activations.
struct NormRounding {
  bool sum = true;             // x + residual, before it is normed
  bool before_weight = false;  // x * inverse, before the weight is multiplied
};

struct NormRules {
  // Elements of the global k_norm weight [num_kv_heads * head_dim] that this rank loads. The weight
  // follows the head it scales: rank / replicas, never rank or tp_size.
  Shard (*k_weight)(const ModelShape& model, int tp_size,
                    int tp_rank) = [](const ModelShape& model, int tp_size, int tp_rank) {
    return partition(model, tp_size, tp_rank).kv_heads.times(model.head_dim);
  };
  // How many equally wide shards the all-reduced sum of squares of k stands for: the mean is
  // sum / (local width * this). Every rank adds its own shard, and a replicated head is in the sum
  // once per replica, in the count as well as in the sum. So the divisor is always tp_size, with
  // replicas or without.
  int (*k_shards)(const ModelShape& model, int tp_size) = [](const ModelShape&, int tp_size) {
    return tp_size;
  };
  // Whether this rank's sum of squares of k enters the all-reduce.
  bool (*k_counts)(const ModelShape& model, int tp_size, int tp_rank) = [](const ModelShape&, int,
                                                                           int) { return true; };
  // k_shards for q.
  int (*q_shards)(const ModelShape& model, int tp_size) = [](const ModelShape&, int tp_size) {
    return tp_size;
  };
  // Which of a rank's statistics are all-reduced: those of q of all tokens come first, those of k
  // of all tokens next. A mean over heads of several ranks needs the sums of all of them.
  Shard (*stats_reduced)(std::int64_t num_tokens) = [](std::int64_t num_tokens) {
    return Shard{0, 2 * num_tokens};
  };

  // How many columns one statistic of a norm of heads spans, of the `local` heads of a rank, of
  // `global` ones in the model. Local columns over local heads: a head, on any number of ranks.
  std::int64_t (*head_width)(int head_dim, std::int64_t local, int global) =
      [](int head_dim, std::int64_t local, int) { return div_exact(local * head_dim, local); };
  // Which of the weights of a norm of heads (0: of q, 1: of k) the heads of q, of k load.
  int head_weight[2] = {0, 1};

  // What a norm of the kind 1 + w adds to its weight.
  float one_plus_weight = 1.0f;
  // Whether a norm adds a second tensor to its input, given that it was called with one or without.
  bool (*adds)(bool has_residual) = [](bool has_residual) { return has_residual; };
  NormRounding rounding;
};

}  // namespace tp
