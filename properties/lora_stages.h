#pragma once
// The stages of LoRA over a linear layer, behind the stage that makes the layer's own outputs:
//
//   lora_load    adapters' files become each rank's slots, which are compared themselves, rank by
//                rank and bit by bit
//   lora_shrink  activations through A, and what the ranks tell each other of it
//   lora_expand  the base's outputs plus what B makes of that
//
// Tensors and buffers: those of the base have its names; what they become is called the same with
// "_lora" behind it.

#include <vector>

#include "properties/lora_call.h"
#include "properties/run/stage.h"

namespace tp::lora {

// `x`: the layer's input, in a buffer of that name. `base_dtype`: of the base's outputs. Where the
// delta joins the ranks' parts (DeltaJoins::partial) the base's output has the rows of all ranks,
// num_tokens each.
std::vector<Stage> stages(const Case& c, const Layer& layer, const TensorSpec& x, DType base_dtype,
                          const ShardingRules& rules, const Variation& variation);

// Each of them: lora_load.cc, lora_shrink.cc, lora_expand.cc.
Stage load_stage(const Case& c, const Layer& layer, const ShardingRules& rules,
                 const Variation& variation);
Stage shrink_stage(const Case& c, const Layer& layer, const TensorSpec& x,
                   const ShardingRules& rules, const Variation& variation);
Stage expand_stage(const Case& c, const Layer& layer, const TensorSpec& x, DType base_dtype,
                   const ShardingRules& rules, const Variation& variation);

// Of the first adapter: what it adds to matrix `part` is scale B A. It must be stored split.
struct Delta {
  TensorSpec a, b;
  double scale;
};
Delta first_delta(const Case& c, const Layer& layer, std::size_t part);

// Multiply-adds of the reference, and of filling and loading the adapters, as linear::work counts.
double work(const Case& c, const Layer& layer);

}  // namespace tp::lora
