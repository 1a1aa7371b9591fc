#pragma once
// The command line as a value: which command, with which options.

#include <string>
#include <vector>

#include "harness/cli/commands.h"

namespace tp {

// `arguments`: without the program's name. Throws BadInput with one sentence.
Command parse_command(const std::vector<std::string>& arguments);

}  // namespace tp
