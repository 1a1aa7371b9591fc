#pragma once
// The activation of a gated MLP in double: out = silu(gate) * up, silu(g) = g / (1 + exp(-g))
// (Shazeer, arXiv 2002.05202), and its budget. The projections before it are those of
// reference/qkv_linear.h.

#include <cmath>

#include "harness/base/compare.h"
#include "harness/base/tensor.h"

namespace tp::reference {

// What a kernel declares of its arithmetic, all of it in fp32.
struct SiluProfile {
  double exp_ulps = 2;  // error of expf, one ulp being at most 2u
  int roundings = 2;    // between exp and silu: of 1 + exp(-g) and of the quotient
};

// Beyond this exp(-gate) may be infinite in fp32, or one more than it; FLT_MAX is exp(88.7228...).
constexpr double kLargestExponent = 88.72;

// gate, up [tokens, intermediate]; out of type t.
//
// The budget. With e = exp(-g) wrong by d relatively, 1 + e is wrong by d e / (1 + e), and sum and
// quotient round once each: silu has the relative error D = d e / (1 + e) + 2u, or D / (1 - D) with
// the products of errors. silu * up rounds once more, before it is rounded to t; in fp32 that is
// the same rounding. What underflow takes, of silu and of the product, is 2^-150 each; of e it is
// nothing beside 1.
//  - Open gates: where e is less than 2^-25, fp32 has 1 + e as 1, and so silu is g, exactly. If it
//    has g * up exactly, too, nothing is lost before the last rounding.
//  - Closed gates: where exp(-g) leaves fp32, the quotient is 0, though g exp(g) would be a number.
//    A kernel may lose all of it.
inline Budget silu_and_mul(const Matrix& gate, const Matrix& up, const SiluProfile& profile,
                           DType t) {
  const double u = 0x1p-24;
  Budget out(gate.rows, gate.cols);
  for (std::size_t i = 0; i < gate.values.size(); ++i) {
    const double g = gate.values[i], v = up.values[i], silu = g / (1 + std::exp(-g));
    double &r = out.r[i], &rho = out.rho[i];
    const bool is_closed = -g > kLargestExponent, is_open = std::exp(-g) < 0x1p-25;
    if (is_open && double(float(g * v)) == g * v) {
      r = g * v;
      continue;
    }
    r = silu * v;
    if (std::isinf(v) && (is_closed || std::fabs(silu) < 0x1p-126)) {
      rho = HUGE_VAL;  // 0 times infinity for a kernel that lost it
      continue;
    }
    if (!std::isfinite(r) || g == 0 || v == 0) continue;  // the very same, or a zero
    const double share = 1 / (1 + std::exp(g));           // e / (1 + e), which is NaN for large e
    const double sum = 2 * u * profile.exp_ulps * share +
                       (profile.roundings + (t == DType::f32 ? 0 : 1)) * u + 0x1p-126;
    const double relative = is_closed ? 1 : sum / (1 - sum) + 8 * 0x1p-53;
    rho = std::fabs(r) * relative + 0x1p-150 * (1 + std::fabs(v));
  }
  return out;
}

}  // namespace tp::reference
