#include <fmt/format.h>

#include "benches/bench.h"

namespace tp {
namespace {

// merged_linear/<tp_size>/<num_tokens>: the same gate and up over all group sizes, 2 x 384 x 512.
void merged_linear(benchmark::State& state) {
  bench_case(state, fmt::format("v1 merged_linear hidden_size=512 intermediate_per_rank={} "
                                "tp_size={} num_tokens={} dtype=bf16 fill=dense seed=1",
                                384 / state.range(0), state.range(0), state.range(1)));
}
BENCHMARK(merged_linear)->ArgsProduct({{1, 8, 16}, {1, 32}})->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace tp
