#pragma once
// tpcheck list: what there is to name on a command line.

#include <string>
#include <vector>

namespace tp {

// "ops", "models", "mutants" or "laws".
const std::vector<std::string>& list_subjects();

// The table for one of them.
std::string list_text(const std::string& subject);

}  // namespace tp
