#pragma once

#include "harness/base/operator.h"

namespace tp {

// Puts every word of CMake's OPERATORS list into the registry. Once, first thing in main.
void register_operators();

}  // namespace tp
