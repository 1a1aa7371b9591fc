#pragma once
// Times of an earlier `tpcheck bench --benchmark_out=FILE`, and how new ones stand to them.

#include <string>
#include <vector>

namespace tp {

struct BenchTime {
  std::string name;
  double us = 0;
};

// The time of each run that was right. Throws BadInput, naming the file, for what is not Google
// Benchmark's JSON, or has no times.
std::vector<BenchTime> read_baseline(const std::string& path);

// A table, one row for each of `now`, in their order, that the baseline has, too; and a line about
// those that are on one side only. A benchmark that ran several times: the fastest.
std::string against_baseline(const std::vector<BenchTime>& baseline,
                             const std::vector<BenchTime>& now);

}  // namespace tp
