#pragma once
// The mistakes on the way from a checkpoint to a rank's weights and scales, put back one at a time:
// for every operator with such a layer, those that can decide anything there.

#include <vector>

#include "properties/stored_linear.h"

namespace tp::stored_linear {

// What an operator's mutants need to know of a case.
struct OfCase {
  Layer (*layer)(const Case&);
  TensorSpec (*x)(const Case&);
  DataRegime (*regime)(const Case&, const Variation&);
};

// Of layers with several matrices whose rows are cut: qkv, gate and up.
std::vector<Mutant> fused_mutants(const OfCase& of);
// Of layers whose columns are cut.
std::vector<Mutant> column_mutants(const OfCase& of);
// Of layers whose kernels want padding.
std::vector<Mutant> padding_mutants(const OfCase& of);

}  // namespace tp::stored_linear
