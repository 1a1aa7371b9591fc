#pragma once
// Numbers in device formats, as a person reads them in a trace.

#include <cstdint>
#include <string>

#include "harness/base/dtype.h"

namespace tp {

// The first few of `count` values of type t, each after a space: " 1 0.5 -3 ...".
std::string first_values(DType t, const void* data, std::int64_t count);

}  // namespace tp
