#pragma once
// Which of attention's kernels takes a call. The one place where that is decided: the launch, the
// profile and the tests ask here.

#include <cstdint>

#include "harness/base/dtype.h"
#include "harness/base/shape.h"
#include "kernels/attention.h"

namespace tp {

enum class AttentionKernel {
  plain,    // fp32 chains
  matrix,   // matrix steps, any width, every kind of logit
  prefill,  // matrix steps, many rows that see many keys
  decode,   // matrix steps, a single one's rows that see very many keys
};

struct AttentionChoice {
  AttentionKernel kernel;
  int tile;   // keys between two rescalings of a partial sum
  int rows;   // of the pack, for a block
  int warps;  // of a block
};

// `group` query heads share a KV head; no query sees more than `visible` keys. `simple`: logits are
// products and a scale above 0, nothing else.
AttentionChoice choose_attention(DType dtype, const ModelShape& model, std::int64_t group,
                                 std::int64_t max_queries, std::int64_t visible, bool simple);

// Keys that one query can see at most.
std::int64_t most_visible(std::int64_t max_kv_len, const AttentionSettings& settings);

}  // namespace tp
