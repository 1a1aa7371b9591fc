#pragma once
// The named decisions of LoRA over sharded bases, for ShardingRules: which rows and columns of an
// adapter a rank's slot holds, what they are scaled by, and which collective the shrunk activations
// need (vLLM's lora/layers/*, SGLang's lora/layers.py and mem_pool.py).

#include <cmath>
#include <cstdint>
#include <vector>

#include "harness/base/shape.h"

namespace tp {

// A base layer of one matrix or several (q, k, v; gate, up), as an adapter on disk sees it: not
// sharded, and every KV head once. And what a rank has of it.
struct LoraBase {
  std::vector<std::int64_t> rows;  // of each matrix
  // Of them, those whose B the rank has: those of its weight. Of a row-parallel layer, which has
  // all of them, a share if ranks share out what they expand ("fully sharded").
  std::vector<Shard> own;
  std::vector<int> replicas;  // on how many ranks each row of the matrix is
  std::int64_t in_features = 0;
  bool cuts_columns = false;  // row-parallel: ranks have columns of the weight, and all of its rows
  int tp_size = 1;
  int tp_rank = 0;

  std::int64_t total_rows() const {
    std::int64_t sum = 0;
    for (const std::int64_t r : rows) sum += r;
    return sum;
  }
};

// What brings the shrunk activations of the ranks together.
enum class ShrinkCollective : std::uint8_t {
  none,
  gather,  // ranks have rows of A: along the rank dimension
  sum,     // ranks have columns of A
};

// Whose sum of the ranks' parts the expanded delta joins.
enum class DeltaJoins : std::uint8_t {
  whole,    // column-parallel, or a row-parallel base that is summed already
  partial,  // a row-parallel base that is summed with it (vLLM), or by the caller
};

struct LoraRules {
  // Rows of B that a slot has room for on this rank, of all matrices together.
  std::int64_t (*slot_rows)(const LoraBase& base) = [](const LoraBase& base) {
    std::int64_t sum = 0;
    for (const Shard& own : base.own) sum += own.size;
    return sum;
  };
  // Rows of the stored B that the slot holds of matrix `part`: of the one B that a fused adapter
  // has, or of the matrix's own.
  Shard (*b_rows)(const LoraBase& base, int part, bool is_fused) = [](const LoraBase& base,
                                                                      int part, bool is_fused) {
    Shard own = base.own[std::size_t(part)];
    for (int before = 0; is_fused && before < part; ++before)
      own.offset += base.rows[std::size_t(before)];
    return own;
  };
  // Rows of A (`max_rank` of them in a slot) that this rank has, if ranks share them out
  // ("fully sharded").
  Shard (*a_rows)(std::int64_t max_rank, bool is_shared_out, int tp_size, int tp_rank) =
      [](std::int64_t max_rank, bool is_shared_out, int tp_size, int tp_rank) {
        if (!is_shared_out) return Shard{0, max_rank};
        const std::int64_t size = div_exact(max_rank, tp_size);
        return Shard{tp_rank * size, size};
      };
  // Columns of A that this rank has.
  Shard (*a_columns)(const LoraBase& base) = [](const LoraBase& base) {
    if (!base.cuts_columns) return Shard{0, base.in_features};
    const std::int64_t size = div_exact(base.in_features, base.tp_size);
    return Shard{base.tp_rank * size, size};
  };
  // Whether a slot is zeroed before an adapter is loaded into it, which may be of a lower rank, or
  // lack a matrix, than the one before.
  bool zeroes_slots = true;

  // What the product with A and B is multiplied by (PEFT: alpha / r, or alpha / sqrt(r)).
  double (*scale)(double alpha, std::int64_t rank, std::int64_t max_rank, bool use_rslora) =
      [](double alpha, std::int64_t rank, std::int64_t, bool use_rslora) {
        return use_rslora ? alpha / std::sqrt(double(rank)) : alpha / double(rank);
      };
  // Where that is done: when B is loaded (vLLM), or in each call.
  bool (*scales_b)(bool merges_scale) = [](bool merges_scale) { return merges_scale; };
  bool (*scales_delta)(bool merges_scale) = [](bool merges_scale) { return !merges_scale; };

  ShrinkCollective (*shrink_collective)(bool cuts_columns, bool shares_out_rank, DeltaJoins joins) =
      [](bool cuts_columns, bool shares_out_rank, DeltaJoins joins) {
        if (!cuts_columns)
          return shares_out_rank ? ShrinkCollective::gather : ShrinkCollective::none;
        // Every rank's own part, through all of B, is its part of the delta.
        return joins == DeltaJoins::partial && !shares_out_rank ? ShrinkCollective::none
                                                                : ShrinkCollective::sum;
      };
  // Where the expanding kernel finds the next matrix's rows of the shrunk activations, `stride`
  // elements on, of `parts` matrices with `elements` elements in all.
  std::int64_t (*slice_stride)(std::int64_t stride, std::int64_t elements, int parts) =
      [](std::int64_t stride, std::int64_t, int) { return stride; };
  // The slot whose adapter a token of `slot` gets; -1: none.
  std::int32_t (*slot_of_token)(std::int32_t slot, std::int32_t slots) =
      [](std::int32_t slot, std::int32_t) { return slot; };
};

}  // namespace tp
