#pragma once
// The definition of RMSNorm in double, one rank, plain loops, and the budget of a correct kernel.
//   out[i][j] = x[i][j] * weight[j] / sqrt(sum_j x[i][j]^2 / divisor + eps)
// (Zhang and Sennrich, arXiv 1910.07467). The budget follows research/numerics.md section 5.1.

#include <cmath>
#include <optional>

#include "harness/base/compare.h"
#include "harness/base/tensor.h"

namespace tp::reference {

// The exponent k if v is 4^k, exactly; otherwise nothing.
inline std::optional<int> log4_of(double v) {
  int exponent = 0;
  if (std::frexp(v, &exponent) != 0.5 || (exponent - 1) % 2 != 0) return std::nullopt;
  return (exponent - 1) / 2;
}

// x [rows, cols], weight [1, cols]. `divisor` is cols for the norm as it is defined; another one is
// how a wrong kernel would look (see discrimination in properties/).
inline Budget rms_norm(const Matrix& x, const Matrix& weight, double eps, const Profile& profile,
                       double divisor) {
  Budget out(x.rows, x.cols);
  const double u = 0x1p-24;
  for (std::int64_t i = 0; i < x.rows; ++i) {
    const double* row = x.row(i);
    double sum = 0;
    bool same_square = true;
    for (std::int64_t j = 0; j < x.cols; ++j) {
      sum += row[j] * row[j];
      same_square = same_square && row[j] * row[j] == row[0] * row[0];
    }
    const double mean = sum / divisor;

    // Exact data: all squares are one power of four, few enough for fp32 to add without rounding in
    // any order, their mean is a power of four again, and eps vanishes against it. Then
    // 1/sqrt(mean) is a power of two and the kernel makes no error at all before its last rounding.
    const std::optional<int> k = log4_of(mean);
    const bool exact = same_square && log4_of(row[0] * row[0]) && profile.terms <= (1 << 24) && k &&
                       eps < mean * u;
    if (exact) {
      for (std::int64_t j = 0; j < x.cols; ++j) {
        const double r = std::ldexp(row[j], -*k) * weight.values[std::size_t(j)];
        out.r[std::size_t(i * x.cols + j)] =
            r;  // one factor is a power of two: exact in fp32 as well
      }
      continue;
    }

    const double variance = mean + eps;
    const double inverse = 1.0 / std::sqrt(variance);
    const std::int64_t depth = profile.depth + profile.all_reduce_terms - 1;
    // Error of the statistic (chain of sums; then division, eps), halved by the square root; of the
    // root and its reciprocal (one ulp is at most 2u); of the two products; and of this very loop.
    const double statistic = chain_error(depth) * mean / variance + 3 * u;
    const double rel =
        statistic / 2 + (2 * profile.rsqrt_ulps + 0.1) * u + 2 * u + double(x.cols) * 0x1p-53;
    for (std::int64_t j = 0; j < x.cols; ++j) {
      const double w = weight.values[std::size_t(j)];
      const double r = row[j] * inverse * w;
      out.r[std::size_t(i * x.cols + j)] = r;
      // The last term is what underflow can take; nothing underflows where x is zero.
      out.rho[std::size_t(i * x.cols + j)] =
          row[j] == 0 ? 0 : std::fabs(r) * rel + 0x1p-149 * (1 + std::fabs(w));
    }
  }
  return out;
}

}  // namespace tp::reference
