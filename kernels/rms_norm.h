#pragma once
// RMSNorm of rows that this rank holds whole: out = x * weight / sqrt(mean(x^2) + eps), in fp32
// with one rounding at the end (contract B of vllm-project/vllm#42379: the weight is multiplied
// before rounding). With a residual, x + residual is rounded to its type and written, and what was
// written is what is normed (vLLM's fused_add_rms_norm).

#include "harness/base/compare.h"
#include "harness/base/sharding_rules.h"
#include "harness/base/tensor.h"
#include "harness/device/stream.h"

namespace tp {

// x, out [rows, cols], any row stride; weight [1, cols]. out must not overlap x. `rounding`: the
// contract, above. May begin before the kernel before it in the stream has ended (overlap.h), which
// must not be what writes the weight. Throws Fault(BadLaunch) where the sizes do not fit each
// other.
template <typename T>
void rms_norm(View<const T> x, View<const T> weight, View<T> out, float eps,
              const NormRounding& rounding, Stream& stream);

// The same of x + residual, which residual_out gets. residual, residual_out [rows, cols], any row
// stride; neither output overlaps an input.
template <typename T>
void add_rms_norm(View<const T> x, View<const T> residual, View<const T> weight,
                  View<T> residual_out, View<T> out, float eps, const NormRounding& rounding,
                  Stream& stream);

// How a row is shared out. In registers: `threads` threads have `vectors` vectors of 16 bytes of
// it each, and where `threads` is less than a warp or one, several rows share a block. Rows that
// are not aligned, or wider than any of these, are read element by element, twice (vectors = 0).
struct RowShare {
  int threads = 0;
  int vectors = 0;
};
// Chosen by a row's width alone, so that its bits do not depend on the other rows. `aligned`: all
// tensors' rows begin at multiples of 16 bytes.
RowShare rms_norm_share(DType t, std::int64_t cols, bool aligned);

// The arithmetic of both over such rows.
Profile rms_norm_profile(DType t, std::int64_t cols, bool aligned);

}  // namespace tp
