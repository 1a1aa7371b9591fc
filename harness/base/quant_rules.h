#pragma once
// The named decisions of quantised linear layers once their weights are loaded, for ShardingRules.

#include <cstdint>

#include "harness/base/slot_reduction.h"

namespace tp {

enum class GatheredScale : unsigned char {
  of_all,     // the largest element of all ranks scales the codes, and unscales them
  own,        // each rank scales by its own, and unscales all by it
  of_rank_0,  // each rank scales by its own, and rank 0's unscales all
};

struct QuantRules {
  // How the slots of a fused layer's scales become the one that all its weights are quantised to
  // anew, and those of input scales the one that activations are divided by.
  SlotReduction (*slots)(bool is_fused_on_disk) = [](bool) { return SlotReduction::max; };
  // Whether each part of a fused layer keeps its own global scale; otherwise all take the one that
  // is made of them so, though their block scales were made for their own.
  bool own_global_scale = true;
  SlotReduction global_scale = SlotReduction::max;

  // Of activations that ranks have some tokens of and gather as codes: whose largest element the
  // codes are scaled by. Each rank's own is right for its own tokens only, and nobody has those
  // alone.
  GatheredScale gathered_scale = GatheredScale::of_all;
};

}  // namespace tp
