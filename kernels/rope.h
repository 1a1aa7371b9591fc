#pragma once
// Rotary position embedding of the q and k heads of a rank (Su et al., arXiv 2104.09864), after an
// RMSNorm of each head where the model has one (Qwen3, Gemma 3): vLLM's fused_qk_norm_rope. The
// first rotary_dim columns of a head rotate in pairs, the others pass. In fp32, with one rounding
// at the end: nothing is rounded between the norm and the rotation.

#include <cstdint>

#include "harness/base/compare.h"
#include "harness/base/shape.h"
#include "harness/base/sharding_rules.h"
#include "harness/base/tensor.h"
#include "harness/device/stream.h"

namespace tp {

// The norm of a head: x / sqrt(mean(x^2) + eps) * (weight_offset + weight).
template <typename T>
struct RopeNorm {
  View<const T> q_weight;  // [1, head_dim], for all heads the same; no data: no weight
  View<const T> k_weight;
  float weight_offset = 0;  // 1 where the model's weight is 1 + w
  float eps = 0;
};

// qkv [tokens, local q | k | v columns, and possibly more]: the fused row of this rank's
// projection. q and k are read where they lie, v is not touched. q_out, k_out [tokens, local width
// of q, of k], any row stride; they do not overlap qkv. cos_sin [positions, rotary_dim], any row
// stride: a row has the cosines of its position, rotary_dim / 2 of them, then the sines. positions
// [tokens], in device memory: each names a row of cos_sin. norm: null where there is none.
// interleaved: columns 2 i and 2 i + 1 are a pair (GPT-J), otherwise i and i + rotary_dim / 2
// (GPT-NeoX, Llama). Throws Fault(BadLaunch) where the sizes do not fit each other.
template <typename T>
void rope(View<const T> qkv, View<const float> cos_sin, const std::int32_t* positions,
          bool interleaved, const RopeNorm<T>* norm, View<T> q_out, View<T> k_out,
          const ModelShape& model, const RankShape& rank, const ShardingRules& rules,
          Stream& stream);

// The arithmetic of the norm.
Profile rope_norm_profile(const ModelShape& model);

}  // namespace tp
