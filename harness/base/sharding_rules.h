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

struct ShardingRules {
  // Elements of the global k_norm weight [num_kv_heads * head_dim] that this rank loads.
  Shard (*k_norm_weight)(const ModelShape& model, int tp_size, int tp_rank);

  // How many equally wide shards the all-reduced sum of squares of k stands for: the mean is
  // sum / (local width * this).
  int (*k_norm_shards)(const ModelShape& model, int tp_size);

  // Whether this rank's sum of squares of k enters the all-reduce.
  bool (*k_norm_counts)(const ModelShape& model, int tp_size, int tp_rank);

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
