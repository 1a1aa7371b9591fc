#pragma once
// The named decisions a sharded operator takes. Each is a function, so that a mutant is the same
// operator with one decision replaced by an upstream mistake, and production code has no `if` for
// it.

#include "harness/base/attention_rules.h"
#include "harness/base/shape.h"

namespace tp {

// Rows of the q, k and v projections, each counted in its own weight.
struct QkvRows {
  Shard q, k, v;
  bool operator==(const QkvRows&) const = default;
};

// Which values inside a norm are rounded to the type of the activations.
struct NormRounding {
  bool sum = true;             // x + residual, before it is normed
  bool before_weight = false;  // x * inverse, before the weight is multiplied
};

struct ShardingRules {
  // Elements of the global k_norm weight [num_kv_heads * head_dim] that this rank loads.
  Shard (*k_norm_weight)(const ModelShape& model, int tp_size, int tp_rank);

  // How many equally wide shards the all-reduced sum of squares of k stands for: the mean is
  // sum / (local width * this).
  int (*k_norm_shards)(const ModelShape& model, int tp_size);

  // Whether this rank's sum of squares of k enters the all-reduce.
  bool (*k_norm_counts)(const ModelShape& model, int tp_size, int tp_rank);

  // ---- Norms and rotary embeddings (rms_norm, qk_norm, rope) ----

  // Which of a rank's statistics are all-reduced: those of q of all tokens come first, those of k
  // of all tokens next.
  Shard (*norm_stats_reduced)(std::int64_t num_tokens);

  // k_norm_shards for q.
  int (*q_norm_shards)(const ModelShape& model, int tp_size);

  // How many columns one statistic of a norm of heads spans, of the `local` heads of a rank, of
  // `global` ones in the model.
  std::int64_t (*head_norm_width)(int head_dim, std::int64_t local, int global);

  // Which of the weights of a norm of heads (0: of q, 1: of k) the heads of q, of k load.
  int head_norm_weight[2];

  // What a norm of the kind 1 + w adds to its weight.
  float one_plus_weight;

  // Whether a norm adds a second tensor to its input, given that it was called with one or without.
  bool (*norm_adds)(bool has_residual);

  NormRounding norm_rounding;

  // How many columns of a head rotate, where a row of the table of cosines and sines has this many.
  std::int64_t (*rope_rotary_dim)(int head_dim, std::int64_t table_cols);

  // Whether neighbours are rotated as a pair, for a model that says so or not.
  bool (*rope_interleaved)(bool model_is_interleaved);

  // Whose position row `token` of the batch takes.
  std::int64_t (*rope_position_of)(std::int64_t token);

  // How many neighbouring heads of a block take the statistic of the first of them.
  int rope_heads_per_statistic;

  // ---- Linear layers (qkv_linear, row_linear) ----

  // Rows of the q_proj, k_proj and v_proj weights that this rank loads, one below the other.
  QkvRows (*qkv_weight_rows)(const ModelShape& model, int tp_size, int tp_rank);

  // The same of their biases.
  QkvRows (*qkv_bias_rows)(const ModelShape& model, int tp_size, int tp_rank);

  // Columns of a row-parallel weight [out_features, in_features] that this rank loads.
  Shard (*row_weight_columns)(std::int64_t in_features, int tp_size, int tp_rank);

  // Whether this rank adds the bias to its partial sum.
  bool (*row_adds_bias)(int tp_rank);

  // How often a row-parallel layer adds its partial sums up over the ranks, if it was asked to
  // reduce its results or to leave that to its caller.
  int (*row_reductions)(bool reduce_results, std::int64_t num_tokens, int tp_size);

  // How often its caller does.
  int (*row_caller_reductions)(bool reduce_results);

  AttentionRules attention = {};
};

// The right decisions (vLLM RMSNormTP and SGLang's after sgl-project/sglang#20967; vLLM
// QKVParallelLinear and RowParallelLinear).
const ShardingRules& sharding_rules();

}  // namespace tp
