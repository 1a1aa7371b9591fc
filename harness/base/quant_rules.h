#pragma once
// The named decisions of quantised linear layers once their weights are loaded, for ShardingRules.

#include <cstdint>

#include "harness/base/slot_reduction.h"

namespace tp {

struct QuantRules {
  // How the slots of a fused layer's scales become the one that all its weights are quantised to
  // anew, and those of input scales the one that activations are divided by.
  SlotReduction weight_scale = SlotReduction::max;
  SlotReduction input_scale = SlotReduction::max;
  // Whether each part of a fused layer keeps its own global scale; otherwise all take the one that
  // weight_scale makes of them, though their block scales were made for their own.
  bool own_global_scale = true;

  // Of activations that ranks hold some tokens of and gather as codes: whether the largest element,
  // which the codes are scaled by, is that of all ranks, or each rank scales by its own.
  bool largest_of_all_ranks = true;
};

}  // namespace tp
