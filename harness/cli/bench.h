#pragma once
// tpcheck bench: Google Benchmark under its own flags.

#include <string>
#include <vector>

namespace tp {

class World;

// Runs the benchmarks that `arguments` select; with --baseline=FILE among them it compares their
// times with those of an earlier run. Returns 0, 1 if any could not be timed (a result was wrong),
// or 2 if none was selected. All processes of a job run the same ones, and the first one speaks.
// Throws BadInput for an argument or a baseline that cannot be read, and Unavailable where there is
// no GPU for it.
int bench_main(World& world, std::vector<std::string> arguments);

}  // namespace tp
