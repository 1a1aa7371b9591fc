#include <fmt/format.h>

#include "benches/bench.h"

namespace tp {
namespace {

// qkv_linear/<tp_size>/<num_tokens> with MiniMax-M2.5's heads over a residual stream an eighth as
// wide as its own, so that the emulator has milliseconds to do, not seconds.
void qkv_linear(benchmark::State& state) {
  bench_case(state,
             fmt::format("v1 qkv_linear hidden_size=384 num_heads=48 num_kv_heads=8 head_dim=16 "
                         "tp_size={} num_tokens={} dtype=bf16 fill=dense seed=1",
                         state.range(0), state.range(1)));
}
BENCHMARK(qkv_linear)->ArgsProduct({{1, 8, 16}, {1, 32}})->Unit(benchmark::kMillisecond);

// The same from a checkpoint, quantised in ways that are common: with its loading.
void qkv_linear_quantised(benchmark::State& state) {
  static constexpr const char* kFormats[] = {
      "quant=fp8_tensor weights=fused activations=token",
      "quant=fp8_block weights=split activations=token_groups dialect=native",
      "quant=nvfp4 weights=split dialect=modelopt"};
  const char* format = kFormats[state.range(0)];
  state.SetLabel(format);
  bench_case(state,
             fmt::format("v1 qkv_linear hidden_size=384 num_heads=48 num_kv_heads=8 head_dim=16 "
                         "tp_size={} num_tokens=32 dtype=bf16 fill=dense seed=1 {}",
                         state.range(1), format));
}
BENCHMARK(qkv_linear_quantised)
    ->ArgNames({"format", "tp_size"})
    ->ArgsProduct({{0, 1, 2}, {1, 16}})
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace tp
