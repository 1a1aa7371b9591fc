#pragma once
// The mistakes of LoRA over sharded bases that a layer's stages can make.

#include <functional>
#include <vector>

#include "properties/lora_call.h"
#include "properties/run/stage.h"

namespace tp::lora {

using LayerOf = std::function<Layer(const Case&)>;

std::vector<Mutant> mutants(const LayerOf& layer_of);

// Whether rules decide anything differently from the right ones in this case.
bool differs(const Case& c, const Layer& layer, const ShardingRules& rules);

}  // namespace tp::lora
