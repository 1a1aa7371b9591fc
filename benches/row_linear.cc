#include <fmt/format.h>

#include "benches/bench.h"

namespace tp {
namespace {

// row_linear/<tp_size>/<num_tokens>: the same weight over all group sizes, 512 x 768.
void row_linear(benchmark::State& state) {
  bench_case(state, fmt::format("v1 row_linear hidden_size=512 in_per_rank={} tp_size={} "
                                "num_tokens={} dtype=bf16 fill=dense seed=1",
                                768 / state.range(0), state.range(0), state.range(1)));
}
BENCHMARK(row_linear)->ArgsProduct({{1, 8, 16}, {1, 32}})->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace tp
