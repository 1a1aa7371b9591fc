#pragma once
// Which rows of a model's unsharded attention tensors a rank holds. Everything follows from
// partition(); there is no second rule here, only widths and the order of the blocks in fused
// tensors.

#include <vector>

#include "harness/base/shape.h"

namespace tp {

// The rows of the whole model's tensors. The fused qkv tensor is q, then k, then v.
struct ProjectionRows {
  std::int64_t q =
      0;  // with attn_output_gate each head has head_dim query rows, then head_dim gate rows
  std::int64_t k = 0;
  std::int64_t v = 0;

  std::int64_t qkv() const { return q + k + v; }
};
ProjectionRows projection_rows(const ModelShape& model);

struct ShardMap {
  RankShape rank;
  Shard q_proj;
  Shard k_proj;
  Shard v_proj;
  std::vector<Shard> qkv_proj;  // of the fused tensor: a piece each of q, k and v
  Shard o_proj_columns;
  Shard q_norm;  // as for full-width norms, whose weights are as wide as all heads together
  Shard k_norm;
  std::vector<Shard> lora_qkv_b;  // of the adapter's B, which has the rows of the fused tensor
};

// Throws BadInput where partition() does.
ShardMap shard_map(const ModelShape& model, int tp_size, int tp_rank);

}  // namespace tp
