// What an emulated CUDA thread costs: with a warp sum and a barrier, and with neither; and what the
// steps of a kernel that works by tiles do.

#include <benchmark/benchmark.h>

#include <chrono>

#include "harness/device/buffer.h"
#include "harness/device/scheduler.h"
#include "harness/device/speed_testing.h"

namespace tp {
namespace {

constexpr int kBlocks = 64;

// Calls launch(stream, x, out) again and again; x and out hold kBlocks * threads floats. The time
// is told for each of the `steps` in a launch.
template <typename Launch>
void measure(benchmark::State& state, int threads, const char* unit, double steps, Launch launch) {
  Scheduler scheduler({.seed = 1});
  scheduler.add_rank(0, [&](Stream& stream) {
    const std::size_t bytes = std::size_t(kBlocks) * std::size_t(threads) * sizeof(float);
    const Buffer x("x", bytes, 0x3F);  // about 0.75, in fp32 and in bf16
    const Buffer out("out", bytes, 0xFF);
    const auto begin = std::chrono::steady_clock::now();
    for (auto _ : state) {
      launch(stream, x.as<float>(), out.as<float>());
      stream.synchronize();
    }
    const std::chrono::duration<double, std::nano> spent = std::chrono::steady_clock::now() - begin;
    state.counters[unit] = spent.count() / (double(state.iterations()) * steps);
  });
  const Report report = scheduler.run();
  if (report.fault) state.SkipWithError(report.fault->what.c_str());
}

void emulator_rms_norm(benchmark::State& state) {
  const int threads = int(state.range(0));
  measure(state, threads, "ns/thread", kBlocks * threads,
          [&](Stream& stream, const float* x, float* out) {
            testing::rms_norm_like(stream, x, out, kBlocks, threads, threads);
          });
}
BENCHMARK(emulator_rms_norm)->Arg(128)->Arg(256)->Arg(512);

void emulator_elementwise(benchmark::State& state) {
  const int threads = int(state.range(0));
  measure(state, threads, "ns/thread", kBlocks * threads,
          [&](Stream& stream, const float* x, float* out) {
            testing::elementwise(stream, x, out, kBlocks, threads);
          });
}
BENCHMARK(emulator_elementwise)->Arg(256);

constexpr int kThreads = 128, kWarps = kBlocks * kThreads / 32, kSteps = 64;

void emulator_mma(benchmark::State& state) {
  const bool loads = state.range(0) != 0;
  measure(state, kThreads, "ns/mma", kWarps * kSteps,
          [&](Stream& stream, const float* x, float* out) {
            testing::products(stream, reinterpret_cast<const bf16*>(x), out, kBlocks, kThreads,
                              kSteps, loads);
          });
}
BENCHMARK(emulator_mma)->ArgName("loads")->Arg(0)->Arg(1);

void emulator_copy_async(benchmark::State& state) {
  constexpr double kKib = kBlocks * kThreads * kSteps * 16 / 1024.0;
  measure(state, kThreads, "ns/KiB", kKib, [&](Stream& stream, const float* x, float* out) {
    testing::copies(stream, x, out, kBlocks, kThreads, kSteps);
  });
}
BENCHMARK(emulator_copy_async);

void emulator_quad_sum(benchmark::State& state) {
  measure(state, kThreads, "ns/warp", kWarps * kSteps,
          [&](Stream& stream, const float* x, float* out) {
            testing::quad_sums(stream, x, out, kBlocks, kThreads, kSteps);
          });
}
BENCHMARK(emulator_quad_sum);

}  // namespace
}  // namespace tp
