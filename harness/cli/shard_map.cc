#include "harness/cli/shard_map.h"

namespace tp {

namespace {

Shard moved(Shard shard, std::int64_t by) { return {shard.offset + by, shard.size}; }

}  // namespace

ProjectionRows projection_rows(const ModelShape& model) {
  return {.q = std::int64_t{model.num_heads} * model.query_dim(),
          .k = std::int64_t{model.num_kv_heads} * model.head_dim,
          .v = std::int64_t{model.num_kv_heads} * model.value_head_dim()};
}

ShardMap shard_map(const ModelShape& model, int tp_size, int tp_rank) {
  ShardMap map;
  map.rank = partition(model, tp_size, tp_rank);
  map.q_proj = map.rank.heads.times(model.query_dim());
  map.k_proj = map.rank.kv_heads.times(model.head_dim);
  map.v_proj = map.rank.kv_heads.times(model.value_head_dim());
  const ProjectionRows whole = projection_rows(model);
  map.qkv_proj = {map.q_proj, moved(map.k_proj, whole.q), moved(map.v_proj, whole.q + whole.k)};
  map.o_proj_columns = map.rank.heads.times(model.value_head_dim());
  map.q_norm = map.rank.heads.times(model.head_dim);
  map.k_norm = map.rank.kv_heads.times(model.head_dim);
  map.lora_qkv_b = map.qkv_proj;
  return map;
}

}  // namespace tp
