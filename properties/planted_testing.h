#pragma once
// The mutants that some test of this executable plants: whoever declares one plants it.

#include <set>
#include <string>

namespace tp {

inline std::set<std::string>& planted_mutants() {
  static std::set<std::string> ids;
  return ids;
}

}  // namespace tp
