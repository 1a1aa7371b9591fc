// How fast the harness itself is: whole cases with all oracles, and the partition law.

#include "benches/bench.h"
#include "harness/base/operator.h"
#include "harness/base/partition_law.h"
#include "harness/group/world.h"

namespace tp {

void bench_case(benchmark::State& state, const std::string& line) {
  World& world = World::current();
  if (world.processes() > 1) {
    // Each process would choose its own number of iterations.
    state.SkipWithError("whole cases are timed in one process");
    return;
  }
  const Case c = case_from_line(line);
  const Operator& op = find_operator(c.op);
  std::uint64_t threads = 0;
  CaseTimes times;
  for (auto _ : state) {
    const Verdict verdict = op.run(world, c, {.times = &times});
    threads += verdict.threads;
    if (verdict.outcome != Outcome::Pass) {
      state.SkipWithError((line + ": " + to_line(verdict)).c_str());
      break;
    }
  }
  state.counters["cases/s"] =
      benchmark::Counter(double(state.iterations()), benchmark::Counter::kIsRate);
  state.counters["threads/s"] = benchmark::Counter(double(threads), benchmark::Counter::kIsRate);
  const double all = times.data + times.kernels + times.reference + times.comparison;
  state.counters["data%"] = 100 * times.data / all;
  state.counters["kernels%"] = 100 * times.kernels / all;
  state.counters["reference%"] = 100 * times.reference / all;
  state.counters["comparison%"] = 100 * times.comparison / all;
}

namespace {

void smallest_case(benchmark::State& state) {
  bench_case(
      state,
      "v1 qk_norm num_heads=2 num_kv_heads=1 head_dim=8 tp_size=2 num_tokens=1 dtype=bf16 seed=1");
}
BENCHMARK(smallest_case);

// All 2,236 legal (num_heads <= 128, num_kv_heads, tp_size <= 16).
void partition_law(benchmark::State& state) {
  std::int64_t triples = 0;
  for (auto _ : state) {
    for (int heads = 1; heads <= 128; ++heads) {
      for (int kv_heads = 1; kv_heads <= heads; ++kv_heads) {
        for (int tp_size = 1; tp_size <= 16; ++tp_size) {
          const ModelShape model{.num_heads = heads, .num_kv_heads = kv_heads};
          if (partitionable(model, tp_size)) continue;
          ++triples;
          benchmark::DoNotOptimize(broken_partition_law(model, tp_size));
        }
      }
    }
  }
  state.SetItemsProcessed(triples);
}
BENCHMARK(partition_law)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace tp
