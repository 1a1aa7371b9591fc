#include <fmt/format.h>

#include "benches/bench.h"

namespace tp {
namespace {

// attention_block/<tp_size>: a narrow model with replicated KV heads, all stages and all oracles.
void attention_block(benchmark::State& state) {
  bench_case(state, fmt::format("v1 attention_block hidden_size=256 num_heads=16 num_kv_heads=2 "
                                "head_dim=32 tp_size={} num_tokens=8 dtype=bf16 fill=dense seed=1 "
                                "qk_norm=full_width rotary=half gate=1",
                                state.range(0)));
}
BENCHMARK(attention_block)->Arg(1)->Arg(4)->Arg(16)->Unit(benchmark::kMillisecond);

// The same with the weights of its linears from a checkpoint, quantised in ways that are common:
// with their loading.
void attention_block_quantised(benchmark::State& state) {
  static constexpr const char* kFormats[] = {
      "weights=split", "weights=fused quant=fp8_tensor activations=token",
      "weights=split quant=fp8_block activations=token_groups dialect=native",
      "weights=split quant=nvfp4 dialect=modelopt"};
  const char* format = kFormats[state.range(0)];
  state.SetLabel(format);
  bench_case(state, fmt::format("v1 attention_block hidden_size=256 num_heads=16 num_kv_heads=2 "
                                "head_dim=32 tp_size={} num_tokens=8 dtype=bf16 fill=dense seed=1 "
                                "qk_norm=full_width rotary=half gate=1 {}",
                                state.range(1), format));
}
BENCHMARK(attention_block_quantised)
    ->ArgNames({"format", "tp_size"})
    ->ArgsProduct({{0, 1, 2, 3}, {1, 16}})
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace tp
