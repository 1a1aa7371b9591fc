#pragma once
// tpcheck fuzz: draws cases, has workers run them, and turns every failure into one line that
// replays.
//
// The loop runs in a process that cannot crash: a supervisor outside MPI that drives worker jobs,
// or, where tpcheck itself was started by mpirun, process 0 in-process.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "harness/fuzz/domain.h"
#include "harness/fuzz/finding.h"
#include "harness/fuzz/progress.h"
#include "harness/fuzz/runner.h"
#include "harness/fuzz/summary.h"
#include "harness/fuzz/where.h"

namespace tp {

class Artifacts;
class World;

struct FuzzOptions {
  std::vector<std::string> ops;  // empty: all
  std::vector<int> tp_sizes;     // empty: 1 .. 16, and with `each` 1 .. 64
  std::vector<std::string>
      models;  // presets or paths of a config.json; {"all"}: every preset; empty: the mix
  std::string adapter = {};  // the folder of one for the only model; empty: none
  double for_seconds = 0;    // 0: no limit of time; 60 where there is no limit of cases either
  std::int64_t cases = 0;    // 0: no limit
  std::optional<std::uint64_t> seed;
  Where where;
  bool poison = true;  // RunOptions::poison
  double timeout = 0;  // of a case, in seconds; 0: as Deadlines has it (deadlines.h)
  std::string artifacts = "findings";
  bool keep_going = false;
  std::string mutant;  // id; empty: the operators as they are
  bool each = false;   // one case for each legal (model, tp_size) instead of drawing
  bool json = false;
};

struct FuzzResult {
  Summary summary;
  std::vector<Finding> findings;  // replayed and shrunk, one of each signature
  std::vector<Finding> unstable;  // failures that their own replay did not show
  std::vector<Finding> not_replayed;
  double seconds_to_first = 0;  // until the first failure was seen; shrinking comes after
  bool interrupted = false;
  std::string where;              // every rank ran
  bool poison = true;             // and guards: whether their oracles were on
  std::optional<GaveUp> gave_up;  // why nothing could be run any more

  // One of harness/base/exit_codes.h.
  int exit_code() const;
};

// Runs cases from `domain` until a limit of `options` is reached or something is found. `report` is
// told of every finding as soon as it is shrunk. `where` is the runner's. Ctrl-C, and a runner that
// gives up, end it with what there is. `artifacts`: where failures are written before
// anything else is tried with them; may be null.
FuzzResult fuzz(Runner& runner, const Where& where, const Domain& domain,
                const FuzzOptions& options, std::uint64_t seed, const Artifacts* artifacts,
                Progress& progress, const FindingReport& report);

// A seed for whoever did not give one.
std::uint64_t random_seed();

// The command. Its exit code is the same on all processes of a launched world; process 0 prints.
int fuzz_main(World* world, const FuzzOptions& options);

}  // namespace tp
