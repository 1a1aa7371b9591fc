#pragma once
// What the tests of planted mistakes share.

#include <cctype>
#include <chrono>
#include <set>
#include <string>

#include "harness/base/operator.h"
#include "harness/group/mpi_testing.h"

namespace tp {

// The mutants that some test of this executable plants: whoever declares one plants it.
inline std::set<std::string>& planted_mutants() {
  static std::set<std::string> ids;
  return ids;
}

// Process 0's line, on all processes, with the mutant of this id if one is given.
inline Verdict run(const std::string& line, const std::string& mutant = "") {
  const std::string shared = test_world().broadcast(line);
  RunOptions options{.deadline = std::chrono::seconds(60)};
  if (!mutant.empty()) options.mutant = find_mutant(mutant).front().mutant;
  const Case c = case_from_line(shared);
  return find_operator(c.op).run(test_world(), c, options);
}

// As the name of a test.
inline std::string test_name(std::string text) {
  for (char& ch : text) ch = std::isalnum(std::uint8_t(ch)) ? ch : '_';
  return text;
}

}  // namespace tp
