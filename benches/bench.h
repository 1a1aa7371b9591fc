#pragma once
// What the benches share: a case run over and over in this process, verified each time.

#include <benchmark/benchmark.h>

#include <string>

namespace tp {

// Runs the case of `line` in each iteration and reports cases/s, emulated threads/s
// and the shares of the time that the data, the kernels, the reference and the comparison took. A
// case that does not pass is an error, never a time.
void bench_case(benchmark::State& state, const std::string& line);

}  // namespace tp
