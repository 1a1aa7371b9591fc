#pragma once
// Cases on the user's own checkpoint.

#include <optional>
#include <string>

#include "properties/stored_linear.h"

namespace tp::stored_linear {

// Why the case is not one on the user's checkpoint, though it says so.
std::optional<std::string> refuse_file(const Case& c, const Layer& layer);

}  // namespace tp::stored_linear
