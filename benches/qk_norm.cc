#include <fmt/format.h>

#include "benches/bench.h"

namespace tp {
namespace {

// qk_norm/<tp_size>/<num_tokens> with MiniMax-M2.5's heads: KV heads sharded, one each, and
// replicated.
void qk_norm(benchmark::State& state) {
  bench_case(
      state,
      fmt::format("v1 qk_norm num_heads=48 num_kv_heads=8 head_dim=128 tp_size={} num_tokens={} "
                  "dtype=bf16 fill=dense seed=1",
                  state.range(0), state.range(1)));
}
BENCHMARK(qk_norm)->ArgsProduct({{1, 2, 8, 16}, {1, 32}})->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace tp
