#pragma once
// A fuzz job's result as one JSON object.

#include <string>

#include "harness/fuzz/fuzz.h"

namespace tp {

std::string to_json(const FuzzResult& result);

}  // namespace tp
