#include "harness/base/sharding_rules.h"

namespace tp {

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
  };
  return kRules;
}

}  // namespace tp
