#include "harness/cli/bench.h"

#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include "harness/base/check.h"
#include "harness/base/exit_codes.h"
#include "harness/base/text.h"
#include "harness/fuzz/where.h"
#include "harness/group/place.h"

namespace tp {

int bench_main(World& world, const std::vector<std::string>& arguments) {
  std::vector<std::string> words = {"tpcheck bench"};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  int argc = int(words.size());
  benchmark::Initialize(&argc, argv.data());  // takes out what it knows
  if (argc > 1) {
    throw BadInput(
        fmt::format("unknown argument '{}' (see tpcheck bench --help)", printable(argv[1])));
  }
  benchmark::AddCustomContext("where",
                              place_phrase(executor_name(), take_place(world, Link::best)));
  // With nothing to run it says so itself.
  const std::size_t matched = benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return matched > 0 ? 0 : kExitBadInput;
}

}  // namespace tp
