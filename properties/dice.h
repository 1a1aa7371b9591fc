#pragma once

#include <cstdint>

#include "harness/base/philox.h"

namespace tp {

// Random numbers that belong to the shape of a case, not to its data: seeded by the case.
class Dice {
 public:
  Dice(std::uint64_t seed, const char* what, std::uint64_t stream = 0)
      : seed_(seed), stream_(stream_of(what) ^ stream * 0x9e3779b97f4a7c15ull) {}
  std::int64_t below(std::int64_t n) {
    return std::int64_t(philox(seed_, stream_, next_++)[0]) % n;
  }

 private:
  std::uint64_t seed_, stream_, next_ = 0;
};

}  // namespace tp
