#pragma once
// The mistakes on the way from a checkpoint to a rank's weights and scales, put back one at a time:
// for every operator with such a layer, those that can decide anything there.

#include <vector>

#include "properties/stored_linear.h"

namespace tp::stored_linear {

// differs() of an operator's layer, or of any of its layers.
using Differs = bool (*)(const Case&, const ShardingRules&);

// Of layers with several matrices whose rows are cut: qkv, gate and up.
std::vector<Mutant> fused_mutants(Differs differs);
// Of layers whose columns are cut.
std::vector<Mutant> column_mutants(Differs differs);
// Of layers whose kernels want padding.
std::vector<Mutant> padding_mutants(Differs differs);

}  // namespace tp::stored_linear
