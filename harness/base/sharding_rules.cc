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
      // A mean over heads of several ranks needs the sums of all of them.
      .norm_stats_reduced =
          [](std::int64_t num_tokens) {
            return Shard{0, 2 * num_tokens};
          },
      .q_norm_shards = [](const ModelShape&, int tp_size) { return tp_size; },
      // Local columns over local heads: a head, on any number of ranks.
      .head_norm_width = [](int head_dim, std::int64_t local,
                            int) { return div_exact(local * head_dim, local); },
      .head_norm_weight = {0, 1},
      .one_plus_weight = 1,
      .norm_adds = [](bool has_residual) { return has_residual; },
      .norm_rounding = {},
      .rope_rotary_dim = [](int, std::int64_t table_cols) { return table_cols; },
      .rope_interleaved = [](bool model_is_interleaved) { return model_is_interleaved; },
      .rope_position_of = [](std::int64_t token) { return token; },
      .rope_heads_per_statistic = 1,
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
