#pragma once
// LoRA over a linear layer of one rank of a group: the shrinking kernel, and the collective that
// its result needs before it is expanded (vLLM's fully sharded layers, SGLang's RowParallelLinear).

#include "harness/base/sharding_rules.h"
#include "harness/group/tp_group.h"
#include "kernels/lora.h"
#include "kernels/lora_slots.h"

namespace tp {

// Room for what is communicated.
template <typename H>
struct LoraScratch {
  H* mine = nullptr;      // [matrices][tokens][this rank's rows of A]
  H* gathered = nullptr;  // all of h, where rows of A are shared out
};

// h: what lora_expand takes on this rank. Of columns of x (cuts_columns) it is this rank's part, or
// the sum of all ranks' in type H; of rows of A, all of them. Throws Fault(BadLaunch) where what
// the ranks have does not make up h.
template <typename T, typename H>
void lora_shrink_over_ranks(View<const T> x, View<const T> a, const LoraBatch& batch,
                            const LoraLayer& layer, DeltaJoins joins, const LoraScratch<H>& scratch,
                            LoraIntermediate<H> h, const ShardingRules& rules, TpGroup& group,
                            Stream& stream);

}  // namespace tp
