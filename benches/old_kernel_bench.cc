#include "benches/old_kernel_bench.h"

#include <chrono>

#include "harness/device/ceilings.h"

namespace tp {

void bench_kernel(benchmark::State& state, const KernelWork& work,
                  const std::function<Launch(Stream&)>& prepare,
                  const std::function<std::string(Stream&)>& verify) {
  const int repeats = ceilings() ? 20 : 1;
  double us = 0;
  bool verified = !verify;
  for (auto _ : state) {
    Scheduler scheduler({.seed = 1, .timed = true});
    std::string wrong;
    double wall_us = 0;
    scheduler.add_rank(0, [&](Stream& stream) {
      const Launch launch = prepare(stream);
      launch(stream);
      stream.synchronize();
      const auto begin = std::chrono::steady_clock::now();
      for (int i = 0; i < repeats; ++i) launch(stream);
      stream.synchronize();
      wall_us = std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin)
                    .count();
      if (!verified) wrong = verify(stream);
      verified = true;
    });
    const Report report = scheduler.run();
    if (report.fault) wrong = report.fault->what;
    if (!wrong.empty()) {
      state.SkipWithError(wrong.c_str());
      return;
    }
    // By the device's clock all launches count, the first one, too.
    us = report.times.contains(0) && report.times.at(0).kernel_us > 0
             ? report.times.at(0).kernel_us / (repeats + 1)
             : wall_us / repeats;
    state.SetIterationTime(us * 1e-6);
  }
  if (ceilings()) {
    state.counters["floor_ratio"] =
        us / ceilings()->floor_us(work.bytes, work.flops, work.matrix_flops);
  }
  state.counters["TFLOP/s"] = (work.flops + work.matrix_flops) / us * 1e-6;
  state.counters["GB/s"] = work.bytes / us * 1e-3;
}

}  // namespace tp
