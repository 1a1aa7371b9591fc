#pragma once
// tpcheck zoo: the mutation score. Every known upstream bug is put back and hunted.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace tp {

class World;

struct ZooOptions {
  std::vector<std::string> mutants;  // ids; empty: all
  double for_seconds = 30;           // for each mutant
  std::optional<std::uint64_t> seed;
  int processes = 0;  // of one worker job; 0: the cores, at most 4
  int jobs = 0;       // 0: as many as fill the cores
  bool json = false;
  std::string on = "emulator";  // where kernels run
};

// Exit code 0 if every mutant was found, else 1.
int zoo_main(World* world, const ZooOptions& options);

}  // namespace tp
