#pragma once
// The q/k norms of a rank.
// qk_norm: the full-width one of MiniMax-M2 and OLMo 2 on one rank: RMSNorm over all query heads of
// the model and over all its KV heads, while this rank holds some of them. The statistics of both
// travel in one fp32 exchange (vLLM RMSNormTP; SGLang's RMSNormTP after sgl-project/sglang#20967),
// which is part of the one kernel (vllm-project/vllm#37045, NVIDIA/TensorRT-LLM#12163) where the
// ranks' kernels can meet, and else an all-reduce between two. Both sum in the same order and give
// the same bits.
// qk_head_norm: the one of single heads, which no other rank has anything to do with: of Qwen3 (one
// weight of head_dim for all heads), of Gemma 3 and Qwen3-Next (1 + w), of Llama 4 (no weight).

#include <cstdint>

#include "harness/base/compare.h"
#include "harness/base/shape.h"
#include "harness/base/sharding_rules.h"
#include "harness/base/tensor.h"
#include "harness/device/stream.h"
#include "harness/group/tp_group.h"

namespace tp {

// The norm's weights as this rank loaded them: [1, local width of q, of k] for qk_norm, [1,
// head_dim] for qk_head_norm, no data where there is no weight.
template <typename T>
struct QkNormWeights {
  View<const T> q;
  View<const T> k;
};

enum class QkNormPath : std::uint8_t {
  peer,        // one kernel, wherever TpGroup::peers() says that ranks' kernels can meet
  collective,  // an all-reduce between two kernels, also where they could
};

// qkv [tokens, local q | k | v columns, and possibly more]: the fused row of this rank's
// projection. q and k are read where they lie, v is not touched. q_out, k_out [tokens, local width
// of q, of k], any row stride. sums [2 * tokens]: workspace in device memory, of q, then of k.
// Every rank passes the same path.
// Throws Fault(BadLaunch) where the sizes do not fit each other.
template <typename T>
void qk_norm(View<const T> qkv, const QkNormWeights<T>& weights, View<T> q_out, View<T> k_out,
             float* sums, const ModelShape& model, const ShardingRules& rules, float eps,
             TpGroup& group, Stream& stream, QkNormPath path = QkNormPath::peer);

// qkv, q_out, k_out as above. weight_offset: 1 where the model's weight is 1 + w, 0 where it is w.
// Throws Fault(BadLaunch) where the sizes do not fit each other.
template <typename T>
void qk_head_norm(View<const T> qkv, const QkNormWeights<T>& weights, float weight_offset,
                  View<T> q_out, View<T> k_out, const ModelShape& model, const RankShape& rank,
                  const ShardingRules& rules, float eps, Stream& stream);

// The arithmetic of qk_head_norm, of q as of k.
Profile qk_head_norm_profile(const ModelShape& model);

// The arithmetic of the two norms of `model` spread over tp_size ranks, on either path.
struct QkNormProfiles {
  Profile q;
  Profile k;
};
QkNormProfiles qk_norm_profiles(const ModelShape& model, DType dtype, int tp_size);

}  // namespace tp
