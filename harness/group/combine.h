#pragma once
// One step of a fold, the same on a device and on the host.

#include "harness/base/dtype.h"
#include "harness/device/larger.h"

namespace tp {

// a + b, or the larger of the two; rounded to T, as NCCL does it at every hop.
template <typename T>
constexpr T combine(bool sum, T a, T b) {
  const float x = to_float(a), y = to_float(b);
  return from_float<T>(sum ? x + y : larger(x, y));
}

}  // namespace tp
