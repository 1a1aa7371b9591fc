#pragma once
// The named decisions a sharded operator takes. Each is a function, so that a mutant is the same
// operator with one decision replaced by an upstream mistake, and production code has no `if` for
// it.

#include "harness/base/attention_rules.h"
#include "harness/base/shape.h"

namespace tp {

struct ShardingRules {
  // Elements of the global k_norm weight [num_kv_heads * head_dim] that this rank loads.
  Shard (*k_norm_weight)(const ModelShape& model, int tp_size, int tp_rank);

  // How many equally wide shards the all-reduced sum of squares of k stands for: the mean is
  // sum / (local width * this).
  int (*k_norm_shards)(const ModelShape& model, int tp_size);

  // Whether this rank's sum of squares of k enters the all-reduce.
  bool (*k_norm_counts)(const ModelShape& model, int tp_size, int tp_rank);

  AttentionRules attention = {};
};

// The right decisions (vLLM RMSNormTP and SGLang's after sgl-project/sglang#20967).
const ShardingRules& sharding_rules();

}  // namespace tp
