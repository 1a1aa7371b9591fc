#pragma once
// A few random bits, fast: which runnable comes next. Reproducible from a seed; not for data.

#include <cstdint>

namespace tp {

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  // SplitMix64 (Steele, Lea, Flood, OOPSLA'14).
  std::uint64_t next() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  // A number in [0, n), n >= 1. The bias is far below anything a schedule could show.
  std::uint32_t below(std::uint32_t n) {
    return std::uint32_t(((next() >> 32) * std::uint64_t{n}) >> 32);
  }

 private:
  std::uint64_t state_;
};

}  // namespace tp
