#pragma once
// Attention with one mistake put back: of upstream projects, and of our own that an engineer could
// make.

#include <vector>

#include "harness/base/operator.h"

namespace tp {

std::vector<Mutant> attention_mutants();

}  // namespace tp
