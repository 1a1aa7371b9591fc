#pragma once
// Grouped-query attention over this rank's heads, as engines run it: prefill, chunked prefill and
// decode of several sequences in one call. Keys and values are rows of the call itself or of a
// page pool. Online softmax in fp32 (FlashAttention-2, arXiv 2307.08691); the range of keys can be
// split, and the parts' states are merged by their log-sum-exp (FlashDecoding; arXiv 2501.01005).

#include <cstdint>
#include <optional>
#include <vector>

#include "harness/base/compare.h"
#include "harness/base/sequences.h"
#include "harness/base/shape.h"
#include "harness/base/sharding_rules.h"
#include "harness/base/tensor.h"
#include "harness/device/stream.h"

namespace tp {

// Which rows belong to which sequence. The host's copy is checked before a launch; the device's is
// what kernels read.
struct AttentionBatch {
  std::vector<std::int32_t> query_start;  // [sequences + 1]: rows of q
  std::vector<std::int32_t> kv_len;       // [sequences]
  // Pages of the pool by sequence [sequences, pages_per_sequence]; or, if page_size is 0, the row
  // of each sequence's first key [sequences, 1].
  std::vector<std::int32_t> table;
  std::int64_t pages_per_sequence = 1;
  std::int64_t page_size = 0;
  struct OnDevice {
    const std::int32_t* query_start = nullptr;
    const std::int32_t* kv_len = nullptr;
    const std::int32_t* table = nullptr;
  } device = {};

  std::int64_t sequences() const { return std::int64_t(kv_len.size()); }
  std::int64_t max_queries() const;
  std::int64_t max_kv_len() const;
};

struct AttentionSettings {
  double scale = 1;
  bool causal = true;
  std::optional<std::int64_t> window;  // keys a query sees, its own included (AttentionMask)
  double softcap = 0;                  // 0: none
  std::int64_t splits = 1;             // parts that the keys of a query are split into
  bool whole_cache = false;  // k and v hold all KV heads of the model, not this rank's only

  AttentionMask mask() const { return {causal, window.value_or(0)}; }
};

// What attention reads and writes. All rows may be strided.
template <typename T>
struct AttentionTensors {
  View<const T> q;                // [tokens, heads * head_dim] of this rank
  View<const T> k;                // [rows, kv_heads * head_dim]
  View<const T> v;                // [rows, kv_heads * v_head_dim]
  const float* sinks = nullptr;   // [heads]: a logit that takes weight and has no value, or none
  const float* slopes = nullptr;  // [heads]: ALiBi, or none
  View<T> out;                    // [tokens, heads * v_head_dim]
  View<float> lse;                // [tokens, heads]: natural log; -infinity where no key is seen
  float* workspace = nullptr;     // attention_workspace() floats
};

// Rows without a visible key are 0 with an LSE of -infinity, or of the sink. f16 and bf16 go
// through matrix steps with softmax weights rounded to T; f32 through fp32 chains. Throws
// Fault(BadLaunch) with the numbers where sizes do not fit each other, head_dim or v_head_dim is
// above 256, a page or row is outside the pool, a length is beyond the table, a window is below 1,
// a stride is below the width, or the output overlaps an input.
template <typename T>
void attention(const AttentionTensors<T>& tensors, const AttentionBatch& batch,
               const AttentionSettings& settings, const ModelShape& model,
               const ShardingRules& rules, int tp_size, int tp_rank, Stream& stream);

// Floats of workspace for the partial states of `tokens` queries; 1 where nothing is split.
std::int64_t attention_workspace(std::int64_t tokens, const ModelShape& model, int tp_size,
                                 std::int64_t splits);

// `settings.splits`, or, if that is 0, as many as suit the call.
std::int64_t attention_splits(DType dtype, const ModelShape& model, int tp_size,
                              const AttentionBatch& batch, const AttentionSettings& settings);

// How attention computes in such a call.
AttentionProfile attention_profile(DType dtype, const ModelShape& model, int tp_size,
                                   const AttentionBatch& batch, const AttentionSettings& settings);

inline constexpr std::int64_t kMaxAttentionHeadDim = 256;
inline constexpr std::int64_t kMaxAttentionSplits = 64;

}  // namespace tp
