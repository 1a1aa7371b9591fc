#pragma once
// The stages before the product, one file each: stored_load.cc, stored_prepare.cc and
// stored_quantise.cc; and what the product has in common with the last one.

#include <cstdint>
#include <vector>

#include "properties/stored_linear.h"
#include "reference/quantise.h"

namespace tp::stored_linear {

Stage load_stage(const Case& c, const Layer& layer, const std::vector<TensorSpec>& biases,
                 const ShardingRules& rules, const Variation& variation);

// Whether there is anything to prepare.
bool is_prepared(const Case& c, const Layer& layer);
Stage prepare_stage(const Case& c, const Layer& layer, bool bias, const ShardingRules& rules);

// Of cases that quantise activations.
Stage quantise_stage(const Case& c, const Layer& layer, const TensorSpec& x,
                     const ShardingRules& rules);
// Where the rank's first column lies in its group, as the rank has it.
std::int64_t first_column(const Case& c, const Layer& layer, const ShardingRules& rules,
                          int tp_rank);
// The factors of a rank's activations: of its part of x_scale, or the one that was known.
reference::Factors x_factors(const Case& c, const Layer& layer, const Matrix& values, int tp_rank);

}  // namespace tp::stored_linear
