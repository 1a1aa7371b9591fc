#include <fmt/format.h>

#include "benches/bench.h"

namespace tp {
namespace {

// rope/<tp_size>/<num_tokens> with Qwen3-30B-A3B's heads, each normed first.
void rope(benchmark::State& state) {
  bench_case(state,
             fmt::format("v1 rope num_heads=32 num_kv_heads=4 head_dim=128 tp_size={} "
                         "num_tokens={} dtype=bf16 fill=dense seed=1 norm=per_head theta=1e6",
                         state.range(0), state.range(1)));
}
BENCHMARK(rope)->ArgsProduct({{1, 4, 8}, {1, 32}})->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace tp
