// What an emulated CUDA thread costs: with a warp sum and a barrier, and with neither.

#include <benchmark/benchmark.h>

#include <chrono>

#include "harness/device/buffer.h"
#include "harness/device/scheduler.h"
#include "harness/device/speed_testing.h"

namespace tp {
namespace {

constexpr int kBlocks = 64;

// Calls launch(stream, x, out) again and again; x and out hold kBlocks * threads floats.
template <typename Launch>
void measure(benchmark::State& state, int threads, Launch launch) {
  Scheduler scheduler({.seed = 1});
  scheduler.add_rank(0, [&](Stream& stream) {
    const std::size_t bytes = std::size_t(kBlocks) * std::size_t(threads) * sizeof(float);
    const Buffer x("x", bytes, 0x01);
    const Buffer out("out", bytes, 0xFF);
    const auto begin = std::chrono::steady_clock::now();
    for (auto _ : state) {
      launch(stream, x.as<float>(), out.as<float>());
      stream.synchronize();
    }
    const std::chrono::duration<double, std::nano> spent = std::chrono::steady_clock::now() - begin;
    state.counters["ns/thread"] = spent.count() / double(state.iterations() * kBlocks * threads);
  });
  const Report report = scheduler.run();
  if (report.fault) state.SkipWithError(report.fault->what.c_str());
}

void emulator_rms_norm(benchmark::State& state) {
  const int threads = int(state.range(0));
  measure(state, threads, [&](Stream& stream, const float* x, float* out) {
    testing::rms_norm_like(stream, x, out, kBlocks, threads, threads);
  });
}
BENCHMARK(emulator_rms_norm)->Arg(128)->Arg(256)->Arg(512);

void emulator_elementwise(benchmark::State& state) {
  const int threads = int(state.range(0));
  measure(state, threads, [&](Stream& stream, const float* x, float* out) {
    testing::elementwise(stream, x, out, kBlocks, threads);
  });
}
BENCHMARK(emulator_elementwise)->Arg(256);

}  // namespace
}  // namespace tp
