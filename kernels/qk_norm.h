#pragma once
// The full-width q/k norm of MiniMax-M2 and OLMo 2 on one rank: RMSNorm over all query heads of the
// model and over all its KV heads, while this rank holds some of them. The statistics of both
// travel in one fp32 all-reduce (vLLM RMSNormTP; SGLang's RMSNormTP after
// sgl-project/sglang#20967).

#include "harness/base/compare.h"
#include "harness/base/shape.h"
#include "harness/base/sharding_rules.h"
#include "harness/base/tensor.h"
#include "harness/device/stream.h"
#include "harness/group/tp_group.h"

namespace tp {

// The norm's weights as this rank loaded them.
template <typename T>
struct QkNormWeights {
  View<const T> q;  // [1, rank.heads.size * head_dim]
  View<const T> k;  // [1, rank.kv_heads.size * head_dim]
};

// qkv [tokens, local q | k | v columns, and possibly more]: the fused row of this rank's
// projection. q and k are read where they lie, v is not touched. q_out, k_out [tokens, local width
// of q, of k], any row stride. sums [2 * tokens]: workspace in device memory. Throws
// Fault(BadLaunch) where the sizes do not fit each other.
template <typename T>
void qk_norm(View<const T> qkv, const QkNormWeights<T>& weights, View<T> q_out, View<T> k_out,
             float* sums, const ModelShape& model, const ShardingRules& rules, float eps,
             TpGroup& group, Stream& stream);

// The arithmetic of the two norms of `model` spread over tp_size ranks.
struct QkNormProfiles {
  Profile q;
  Profile k;
};
QkNormProfiles qk_norm_profiles(const ModelShape& model, int tp_size);

}  // namespace tp
