#pragma once
// The named decisions of attention under tensor parallelism, for ShardingRules. Most upstream bugs
// of attention are one of these decided otherwise.

#include <cstdint>
#include <limits>

#include "harness/base/shape.h"

namespace tp {

// Query and KV heads that a call of attention is told it has.
struct HeadCounts {
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
};

// Query head j of this rank finds its keys in head first + j / group of the buffer it reads.
struct KvHeadMap {
  std::int64_t first = 0;
  std::int64_t group = 1;
};

// ALiBi's slopes of a rank: these entries of the list for a model of so many heads.
struct Slopes {
  std::int64_t model_heads = 0;
  Shard entries;
};

struct AttentionRules {
  // The counts that a rank calls attention with: its own, never the model's (vllm#39707).
  HeadCounts (*heads)(const ModelShape& model, int tp_size) = [](const ModelShape& model, int tp) {
    const RankShape rank = partition(model, tp, 0);
    return HeadCounts{rank.heads.size, rank.kv_heads.size};
  };
  // Elements between rows of a view that is `stride` apart and `cols` wide (vllm#39707: the views
  // were taken for contiguous).
  std::int64_t (*row_stride)(std::int64_t stride, std::int64_t cols) =
      [](std::int64_t stride, std::int64_t) { return stride; };
  // Where queries find their keys, in a cache of this rank's own KV heads or of all of them.
  KvHeadMap (*kv_heads)(const ModelShape& model, int tp_size, int tp_rank, bool whole_cache) =
      [](const ModelShape& model, int tp, int tp_rank, bool whole) {
        const RankShape rank = partition(model, tp, tp_rank);
        return KvHeadMap{whole ? rank.kv_heads.offset : 0, rank.heads.size / rank.kv_heads.size};
      };
  // Entries of a vector with one value a query head (sinks, gates) that are this rank's.
  Shard (*head_vector)(const ModelShape& model, int tp_size,
                       int tp_rank) = [](const ModelShape& model, int tp, int tp_rank) {
    return partition(model, tp, tp_rank).heads;
  };
  // Query heads whose part of the output gate's projection this rank loads.
  Shard (*gate_heads)(const ModelShape& model, int tp_size,
                      int tp_rank) = [](const ModelShape& model, int tp, int tp_rank) {
    return partition(model, tp, tp_rank).heads;
  };
  Slopes (*slopes)(const ModelShape& model, int tp_size, int tp_rank) = [](const ModelShape& model,
                                                                           int tp, int tp_rank) {
    return Slopes{model.num_heads, partition(model, tp, tp_rank).heads};
  };
  // Columns between the value heads of one row.
  std::int64_t (*v_head_stride)(const ModelShape& model) = [](const ModelShape& model) {
    return std::int64_t{model.value_head_dim()};
  };

  // What products q.k are multiplied with, in a model whose own scale is `scale`.
  double (*scale)(double scale, const ModelShape& model) = [](double scale, const ModelShape&) {
    return scale;
  };
  // 1: queries stand behind the keys that were there before them; 0: at the first ones.
  int behind_context = 1;
  // A causal query sees this many keys beyond its own position.
  std::int64_t causal_ahead = 0;
  // Keys in front of and behind its own that a query sees in a window of `window`.
  std::int64_t (*window_left)(std::int64_t window, bool decode) = [](std::int64_t window, bool) {
    return window - 1;
  };
  std::int64_t (*window_right)(std::int64_t window, bool causal) =
      [](std::int64_t window, bool causal) { return causal ? 0 : window - 1; };
  // A sequence's length is counted in this many keys.
  std::int64_t (*length_unit)(std::int64_t page_size) = [](std::int64_t) {
    return std::int64_t{1};
  };
  // Tiles of `tile` keys that `keys` consecutive keys can lie in: the first of them begins a tile,
  // or, in a window, it may lie anywhere in one.
  std::int64_t (*tiles_of)(std::int64_t keys, std::int64_t tile, bool in_window) =
      [](std::int64_t keys, std::int64_t tile, bool in_window) {
        return (keys + tile - 1) / tile + (in_window ? 1 : 0);
      };
  // Tiles that each of `splits` takes of `tiles`.
  std::int64_t (*tiles_of_split)(std::int64_t tiles, std::int64_t splits) =
      [](std::int64_t tiles, std::int64_t splits) { return (tiles + splits - 1) / splits; };
  // Entries between the rows of a page table that has `allocated` a row, of which `used` at most
  // are in use.
  std::int64_t (*table_stride)(std::int64_t allocated, std::int64_t used) =
      [](std::int64_t allocated, std::int64_t) { return allocated; };
  // Pages at the end of a sequence for which the one before them is read.
  int stale_pages = 0;
  // Bits that the product of a page and its stride keeps.
  int offset_bits = 64;

  // What a hidden key's logit, and the maximum of no logits, is.
  float hidden_logit = -std::numeric_limits<float>::infinity();
  // What is subtracted from logits of which none is above -infinity.
  float empty_maximum = 0.0f;
  // Unit of the log-sum-exp of a part of the keys, in nats.
  float lse_unit = 1.0f;
};

}  // namespace tp
