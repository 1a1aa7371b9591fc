#include "harness/base/sharding_rules.h"

namespace tp {

namespace {

QkvRows rows_of_own_heads(const ModelShape& model, int tp_size, int tp_rank) {
  const RankShape rank = partition(model, tp_size, tp_rank);
  return {rank.heads.times(model.head_dim), rank.kv_heads.times(model.head_dim),
          rank.kv_heads.times(model.value_head_dim())};
}

}  // namespace

const ShardingRules& sharding_rules() {
  static constexpr ShardingRules kRules{
      // The weight follows the head it scales: rank / replicas, never rank or tp_size.
      .k_norm_weight =
          [](const ModelShape& model, int tp_size, int tp_rank) {
            return partition(model, tp_size, tp_rank).kv_heads.times(model.head_dim);
          },
      // Every rank adds its own shard, and a replicated head is in the sum once per replica, in the
      // count as well as in the sum. So the divisor is always tp_size, with replicas or without.
      .k_norm_shards = [](const ModelShape&, int tp_size) { return tp_size; },
      .k_norm_counts = [](const ModelShape&, int, int) { return true; },
      .qkv_weight_rows = rows_of_own_heads,
      .qkv_bias_rows = rows_of_own_heads,
      .row_weight_columns =
          [](std::int64_t in_features, int tp_size, int tp_rank) {
            const std::int64_t size = div_exact(in_features, tp_size);
            return Shard{tp_rank * size, size};
          },
      // The sum over the ranks must contain it once.
      .row_adds_bias = [](int tp_rank) { return tp_rank == 0; },
      .row_reductions = [](bool reduce_results, std::int64_t,
                           int) { return reduce_results ? 1 : 0; },
      .row_caller_reductions = [](bool reduce_results) { return reduce_results ? 0 : 1; },
  };
  return kRules;
}

}  // namespace tp
