#pragma once
// tpcheck zoo: the mutation score. Every known upstream bug is put back and hunted.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "harness/fuzz/where.h"

namespace tp {

class World;

struct ZooOptions {
  std::vector<std::string> mutants;  // ids; empty: all
  double for_seconds = 30;           // for each mutant
  std::optional<std::uint64_t> seed;
  Where where;
  bool json = false;
};

// Exit code 0 if every mutant was found, else 1; 3, 70 or 72 where the hunt was broken off.
int zoo_main(World* world, const ZooOptions& options);

}  // namespace tp
