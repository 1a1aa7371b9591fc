#pragma once
// STUB
#include "harness/base/fill.h"
#include "harness/base/case.h"
#include "harness/base/sequences.h"
namespace tp {
struct AttentionData { ModelShape model; std::vector<Sequence> sequences; AttentionMask mask; std::int64_t slots, tokens, page_size, kv_tile; double scale; Fill fill; };
inline TensorSpec attention_q(DType t, const AttentionData& d) { return {"q", t, d.tokens, std::int64_t{d.model.num_heads} * d.model.head_dim, Role::activation, d.model.head_dim}; }
inline TensorSpec attention_k(DType t, const AttentionData& d) { return {"k", t, d.slots, std::int64_t{d.model.num_kv_heads} * d.model.head_dim, Role::activation, d.model.head_dim}; }
inline TensorSpec attention_v(DType t, const AttentionData& d) { return {"v", t, d.slots, std::int64_t{d.model.num_kv_heads} * d.model.value_head_dim(), Role::activation, d.model.value_head_dim()}; }
inline TensorSpec attention_sinks(const AttentionData& d) { return {"sinks", DType::f32, 1, d.model.num_heads, Role::activation, 1}; }
inline Key attention_fill_key() { return shared_key("fill"); }
}
