#pragma once
// The data of q, k, v and sinks of an attention call. What softmax makes of ordinary numbers hides
// most mistakes: of 16k keys none matters (numerics.md section 6.4). So besides the plain kinds,
// which each tensor is filled with by itself, there are three in which queries know the keys:
//   one_hot   a query's score is high at one key (an edge of something, or drawn) and so far below
//             there at all others that the output is that key's v, bit for bit
//   ties      q = 0: the output is the mean of v over exactly the visible keys
//   tripwire  real softmax in which the first key, the last one, the next forbidden one and those
//             at the edges of pages and tiles carry most of the weight
// A key and its value depend on their sequence, position and KV head, not on the slot that holds
// them. Slots that no sequence owns hold what a leak would show.

#include <cstdint>
#include <vector>

#include "harness/base/case.h"
#include "harness/base/fill.h"
#include "harness/base/sequences.h"

namespace tp {

// What the data need to know of the call.
struct AttentionData {
  ModelShape model;
  std::vector<Sequence> sequences;
  AttentionMask mask;
  std::int64_t slots = 0;      // rows of k and v
  std::int64_t tokens = 0;     // rows of q
  std::int64_t page_size = 0;  // 0: rows, no pages
  std::int64_t kv_tile = 16;   // where a kernel's tiles may meet
  double scale = 1;
  Fill fill = Fill::exact;
  double softcap = 0;  // 0: none
};

// q [tokens, num_heads * head_dim], k [slots, num_kv_heads * head_dim], v [slots, num_kv_heads *
// value_head_dim], sinks [1, num_heads] in f32.
TensorSpec attention_q(DType dtype, const AttentionData& data);
TensorSpec attention_k(DType dtype, const AttentionData& data);
TensorSpec attention_v(DType dtype, const AttentionData& data);
TensorSpec attention_sinks(const AttentionData& data);

// The key `fill` of attention: the kinds that make sense here. Half of the draws are exact kinds.
Key attention_fill_key();

}  // namespace tp
