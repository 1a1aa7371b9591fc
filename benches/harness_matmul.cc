// How fast the device layer's product is: square matrices, as large as the executor has time for.

#include <benchmark/benchmark.h>

#include "harness/device/buffer.h"
#include "harness/device/matmul.h"
#include "harness/device/scheduler.h"
#include "harness/group/place.h"

namespace tp {
namespace {

constexpr int kLaunches = 10;  // between two looks at the clock

// matmul<T>/<rows>: rows x n x n, n = 4096 on a GPU and 128 in the emulator.
template <typename T>
void matmul(benchmark::State& state) {
  const std::int64_t n = executor_name() == "gpu" ? 4096 : 128, m = std::min(n, state.range(0));
  Scheduler scheduler({.seed = 1});
  scheduler.add_rank(0, [&](Stream& stream) {
    const std::size_t width = std::size_t(n) * sizeof(T);
    const Buffer x("x", std::size_t(m) * width, 0x3C), w("w", std::size_t(n) * width, 0x3C),
        out("out", std::size_t(m) * width, 0xFF);
    const auto product = [&] {
      tp::matmul<T>({x.as<T>(), m, n, n}, {w.as<T>(), n, n, n}, nullptr, {out.as<T>(), m, n, n},
                    stream);
    };
    product();
    stream.synchronize();
    for (auto _ : state) {
      for (int i = 0; i < kLaunches; ++i) product();
      stream.synchronize();
    }
  });
  const Report report = scheduler.run();
  if (report.fault) state.SkipWithError(report.fault->what.c_str());
  state.counters["flop/s"] = benchmark::Counter(2.0 * double(m) * double(n) * double(n) * kLaunches,
                                                benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(matmul<float>)->Arg(16)->Arg(4096)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK(matmul<f16>)->Arg(16)->Arg(4096)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK(matmul<bf16>)->Arg(16)->Arg(4096)->UseRealTime()->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace tp
