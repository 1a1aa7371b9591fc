#pragma once
// The shape of a model, and the one rule that says which rank owns which of its heads.
//
// Rule (vLLM and SGLang alike): with H query heads and K KV heads on T ranks, H divides by T. If T
// <= K the KV heads are cut into T runs; if T > K each KV head is held by T/K *consecutive* ranks.

#include <cstdint>
#include <optional>
#include <string>

namespace tp {

// A model's attention shape as its config states it: global, independent of tp_size.
struct ModelShape {
  int hidden_size = 0;  // width of the residual stream; need not equal num_heads * head_dim
  int num_heads = 1;
  int num_kv_heads = 1;
  int head_dim = 1;
  int v_head_dim = 0;  // 0: the same as head_dim
  bool attn_output_gate = false;

  int value_head_dim() const { return v_head_dim > 0 ? v_head_dim : head_dim; }
  // Rows of q_proj that a head has: its query, and then its gate if there is one.
  int query_dim() const { return attn_output_gate ? 2 * head_dim : head_dim; }
  bool operator==(const ModelShape&) const = default;
};

// Half-open range [offset, offset + size) of a *global* axis.
struct Shard {
  std::int64_t offset = 0;
  std::int64_t size = 0;

  std::int64_t end() const { return offset + size; }
  // The same range with every unit (a head, say) being `width` columns wide.
  Shard times(std::int64_t width) const { return {offset * width, size * width}; }
  bool operator==(const Shard&) const = default;
};

// One rank's part of a model. There is no local num_kv_heads: it is kv_heads.size.
struct RankShape {
  Shard heads;     // query heads
  Shard kv_heads;  // key/value heads; the same on num_kv_head_replicas consecutive ranks
  int num_kv_head_replicas = 1;  // 1 unless tp_size > num_kv_heads

  bool operator==(const RankShape&) const = default;
};

// a / b where b must divide a. Throws BadInput naming both numbers otherwise.
std::int64_t div_exact(std::int64_t a, std::int64_t b);

// Why `model` cannot be spread over tp_size ranks, in one sentence; nothing if it can.
std::optional<std::string> partitionable(const ModelShape& model, int tp_size);

// What rank tp_rank of tp_size owns. Throws BadInput where partitionable() has a reason.
RankShape partition(const ModelShape& model, int tp_size, int tp_rank);

}  // namespace tp
