// How fast the device layer's products are: square matrices, as large as the executor has time for.

#include <benchmark/benchmark.h>

#include <functional>
#include <memory>

#include "harness/device/buffer.h"
#include "harness/device/matmul.h"
#include "harness/device/scaled_matmul.h"
#include "harness/device/scheduler.h"
#include "harness/group/place.h"

namespace tp {
namespace {

constexpr int kLaunches = 10;  // between two looks at the clock

// Rows x n x n, n = 4096 on a GPU and 128 in the emulator. make(stream, rows, n) returns the
// launch.
using Make = std::function<std::function<void()>(Stream&, std::int64_t rows, std::int64_t n)>;
void bench_product(benchmark::State& state, const Make& make) {
  const std::int64_t n = executor_name() == "gpu" ? 4096 : 128, m = std::min(n, state.range(0));
  Scheduler scheduler({.seed = 1});
  scheduler.add_rank(0, [&](Stream& stream) {
    const std::function<void()> product = make(stream, m, n);
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

// Every byte the same, of no matter what type.
std::shared_ptr<Buffer> filled(std::int64_t bytes) {
  return std::make_shared<Buffer>("operand", std::size_t(bytes), 0x3C);
}

template <typename T>
void matmul(benchmark::State& state) {
  bench_product(state, [](Stream& stream, std::int64_t m, std::int64_t n) {
    const auto width = n * std::int64_t(sizeof(T));
    return [=, &stream, x = filled(m * width), w = filled(n * width), out = filled(m * width)] {
      tp::matmul<T>({x->as<T>(), m, n, n}, {w->as<T>(), n, n, n}, nullptr, {out->as<T>(), m, n, n},
                    stream);
    };
  });
}
BENCHMARK(matmul<float>)->Arg(16)->Arg(4096)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK(matmul<f16>)->Arg(16)->Arg(4096)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK(matmul<bf16>)->Arg(16)->Arg(4096)->UseRealTime()->Unit(benchmark::kMillisecond);

// e4m3 codes of activations and of weights: with a scale for each row of either, or (block > 0) for
// each block of columns of a row.
void fp8_matmul(benchmark::State& state) {
  const std::int64_t block = state.range(1);
  bench_product(state, [=](Stream& stream, std::int64_t m, std::int64_t n) {
    const std::int64_t blocks = block > 0 ? (n + block - 1) / block : 1;
    return [=, &stream, x = filled(m * n), w = filled(n * n), out = filled(m * n * 2),
            x_scales = filled(m * blocks * 4), w_scales = filled(n * blocks * 4)] {
      scaled_matmul<e4m3, View<const e4m3>, bf16, bf16>(
          {x->as<e4m3>(), m, n, n}, {x_scales->as<float>(), blocks, block, 0},
          {w->as<e4m3>(), n, n, n}, {w_scales->as<float>(), blocks, block, 0}, nullptr,
          {out->as<bf16>(), m, n, n}, stream);
    };
  });
}
BENCHMARK(fp8_matmul)
    ->ArgNames({"rows", "block"})
    ->ArgsProduct({{16, 4096}, {0, 128}})
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);

// bf16 activations, and weights of two codes a byte with a scale for 16 of them.
void nvfp4_matmul(benchmark::State& state) {
  bench_product(state, [](Stream& stream, std::int64_t m, std::int64_t n) {
    return [=, &stream, x = filled(m * n * 2), codes = filled(n * n / 2),
            scales = filled(n * n / 16), global = filled(4), out = filled(m * n * 2)] {
      const Nvfp4Weight weight{
          {codes->as<std::uint8_t>(), n, n / 2, n / 2}, {scales->as<e4m3>(), n, n / 16, n / 16}, n};
      scaled_matmul<bf16, Nvfp4Weight, bf16, bf16>({x->as<bf16>(), m, n, n}, {}, weight,
                                                   {global->as<float>()}, nullptr,
                                                   {out->as<bf16>(), m, n, n}, stream);
    };
  });
}
BENCHMARK(nvfp4_matmul)->Arg(16)->Arg(4096)->UseRealTime()->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace tp
