#include <fmt/format.h>

#include "benches/bench.h"

namespace tp {
namespace {

// lora/<tp_size>/<num_tokens>: qkv of a narrow model, four adapters of rank 16.
void lora(benchmark::State& state) {
  bench_case(state, fmt::format("v1 lora hidden_size=512 num_heads=16 num_kv_heads=4 head_dim=32 "
                                "tp_size={} num_tokens={} dtype=bf16 fill=dense seed=1 module=qkv "
                                "adapters=4 max_rank=16 segments=runs",
                                state.range(0), state.range(1)));
}
BENCHMARK(lora)->ArgsProduct({{1, 8, 16}, {1, 32}})->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace tp
