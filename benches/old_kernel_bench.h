#pragma once
// Kernels alone, at sizes that no case has: on a GPU timed by its own clock and compared with its
// floor, on the emulator by the wall clock.

#include <benchmark/benchmark.h>

#include <functional>

#include "harness/device/scheduler.h"
#include "harness/device/stream.h"

namespace tp {

// The least that a launch must do.
struct KernelWork {
  double bytes = 0;
  double flops = 0;
  double matrix_flops = 0;
};

// In each iteration: `prepare(stream)` makes what is needed and returns the launch, which then runs
// once to warm up and some times more. Manual time is that of one launch. Counters: floor_ratio,
// TFLOP/s, GB/s. What prepare returns may throw Fault; `verify`, if there is one, is asked after
// the last iteration and says what is wrong with the results.
using Launch = std::function<void(Stream&)>;
void bench_kernel(benchmark::State& state, const KernelWork& work,
                  const std::function<Launch(Stream&)>& prepare,
                  const std::function<std::string(Stream&)>& verify = {});

}  // namespace tp
