#pragma once
// The named decisions of linear layers under tensor parallelism, for ShardingRules (vLLM's
// QKVParallelLinear and RowParallelLinear).

#include <cstdint>

#include "harness/base/shape.h"

namespace tp {

// Rows of the q, k and v projections, each counted in its own weight.
struct QkvRows {
  Shard q, k, v;
  bool operator==(const QkvRows&) const = default;
};

inline QkvRows rows_of_own_heads(const ModelShape& model, int tp_size, int tp_rank) {
  const RankShape rank = partition(model, tp_size, tp_rank);
  return {rank.heads.times(model.query_dim()), rank.kv_heads.times(model.head_dim),
          rank.kv_heads.times(model.value_head_dim())};
}

struct LinearRules {
  // Rows of the q_proj, k_proj and v_proj weights that this rank loads, one below the other.
  QkvRows (*qkv_weight_rows)(const ModelShape& model, int tp_size, int tp_rank) = rows_of_own_heads;
  // The same of their biases.
  QkvRows (*qkv_bias_rows)(const ModelShape& model, int tp_size, int tp_rank) = rows_of_own_heads;

  // Columns of a row-parallel weight [out_features, in_features] that this rank loads.
  Shard (*row_weight_columns)(std::int64_t in_features, int tp_size, int tp_rank) =
      [](std::int64_t in_features, int tp_size, int tp_rank) {
        const std::int64_t size = div_exact(in_features, tp_size);
        return Shard{tp_rank * size, size};
      };
  // Whether this rank adds the bias to its partial sum: the sum over the ranks must contain it
  // once.
  bool (*row_adds_bias)(int tp_rank) = [](int tp_rank) { return tp_rank == 0; };
  // How often a row-parallel layer adds its partial sums up over the ranks, if it was asked to
  // reduce its results or to leave that to its caller.
  int (*row_reductions)(bool reduce_results, std::int64_t num_tokens, int tp_size) =
      [](bool reduce_results, std::int64_t, int) { return reduce_results ? 1 : 0; };
  // How often its caller does.
  int (*row_caller_reductions)(bool reduce_results) = [](bool reduce_results) {
    return reduce_results ? 0 : 1;
  };
};

}  // namespace tp
