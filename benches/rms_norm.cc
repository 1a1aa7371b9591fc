#include <fmt/format.h>

#include "benches/bench.h"

namespace tp {
namespace {

// rms_norm/<hidden_size>/<num_tokens>: rows of MiniMax-M2 and of Llama 3.1 70B.
void rms_norm(benchmark::State& state) {
  bench_case(
      state,
      fmt::format("v1 rms_norm hidden_size={} tp_size=1 num_tokens={} dtype=bf16 fill=dense seed=1",
                  state.range(0), state.range(1)));
}
BENCHMARK(rms_norm)->ArgsProduct({{3072, 8192}, {1, 32}})->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace tp
