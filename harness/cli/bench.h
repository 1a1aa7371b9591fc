#pragma once
// tpcheck bench: Google Benchmark under its own flags.

#include <string>
#include <vector>

namespace tp {

class World;

// Runs the benchmarks that `arguments` select. Returns 0, or 2 if they select none. Throws BadInput
// for an argument that Google Benchmark does not know, and Unavailable where there is no GPU for
// it.
int bench_main(World& world, const std::vector<std::string>& arguments);

}  // namespace tp
