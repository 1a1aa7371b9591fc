#pragma once
// The slots of a layer's adapters on one rank: A and B in device memory, sized for a maximum rank,
// and the way from an adapter's file to them (vLLM's lora_a_stacked and lora_b_stacked, SGLang's
// LoRAMemoryPool). It is here, beside the kernels, because it is tested as they are.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "harness/base/peft.h"
#include "harness/base/sharding_rules.h"
#include "harness/base/tensor.h"
#include "harness/device/stream.h"

namespace tp {

struct LoraLayer {
  LoraBase base;
  std::int64_t max_rank = 0;  // of a slot
  // "Fully sharded": ranks have a share each of A's rows where the base is column-parallel, of B's
  // where it is row-parallel.
  bool shares_out_rank = false;
  bool merges_scale = false;       // B is multiplied by the adapter's factor when it is loaded
  std::string prefix;              // of the modules' names: "model.layers.0.self_attn."
  std::vector<std::string> parts;  // "q_proj", "k_proj", "v_proj"
  std::string fused;               // "qkv_proj"; empty: no adapter has them as one
};

// Of a slot on this rank under these rules.
Shard lora_own_a(const LoraLayer& layer, const ShardingRules& rules);          // of each matrix's A
std::int64_t lora_a_rows(const LoraLayer& layer, const ShardingRules& rules);  // of each matrix's A
std::int64_t lora_b_rows(const LoraLayer& layer, const ShardingRules& rules);  // of all B
// Rows of B of each matrix, of an adapter that is stored like this.
std::vector<std::int64_t> lora_b_parts(const LoraLayer& layer, const ShardingRules& rules,
                                       bool is_fused);

// What the kernels are told of a slot's matrices.
struct LoraSlotState {
  std::vector<std::int32_t> ranks;  // of each matrix, 0: the adapter has none
  std::vector<float> scales;        // factors that are left to the call
};

// Adapters in slots, T being the type of the activations.
template <typename T>
class LoraSlots {
 public:
  // a [slots * matrices * lora_a_rows, columns of the rank]; b [slots * lora_b_rows, max_rank];
  // bias [slots, lora_b_rows], or no rows: adapters have none. The memory is the caller's, and
  // holds anything. Throws Fault(BadLaunch) where the sizes do not fit.
  LoraSlots(const LoraLayer& layer, const ShardingRules& rules, View<T> a, View<T> b, View<T> bias,
            Stream& stream);

  // Puts the layer's modules of `adapter` into the slot: rank r of max_rank in its first rows (A)
  // and columns (B), zeros elsewhere. F32, F16 and BF16 are rounded to T; B and its bias, if the
  // scale is merged into them, are rounded, multiplied in fp32 and rounded again (as vLLM does).
  // One A of a fused module is that of every matrix. The copies are on the stream; the adapter may
  // go at once. Throws BadInput naming file, tensor and numbers: a rank above max_rank, A or B that
  // do not fit the base, a bias for which there is no memory, both the fused module and one of its
  // matrices' own. An adapter that does not
  // change the layer leaves zeros. Fault(OutOfBounds) where rows or columns are taken that a
  // tensor does not have, Fault(BadLaunch) where they are not as many as the slot has room for.
  LoraSlotState load(int slot, const PeftAdapter& adapter);
  // Zeros.
  void unload(int slot);

 private:
  void require_slot(int slot) const;

  LoraLayer layer_;
  ShardingRules rules_;
  View<T> a_, b_, bias_;
  int slots_ = 0;
  Stream& stream_;
};

}  // namespace tp
