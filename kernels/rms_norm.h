#pragma once
// RMSNorm of rows that this rank holds whole: out = x * weight / sqrt(mean(x^2) + eps), in fp32
// with one rounding at the end (contract B of vllm-project/vllm#42379: the weight is multiplied
// before rounding).

#include "harness/base/compare.h"
#include "harness/base/tensor.h"
#include "harness/device/stream.h"

namespace tp {

// x, out [rows, cols], any row stride; weight [1, cols]. out must not overlap x.
// Throws Fault(BadLaunch) where the sizes do not fit each other.
template <typename T>
void rms_norm(View<const T> x, View<const T> weight, View<T> out, float eps, Stream& stream);

// The arithmetic of rms_norm over rows of `cols` elements.
Profile rms_norm_profile(std::int64_t cols);

}  // namespace tp
