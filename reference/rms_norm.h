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

// 1/sqrt(mean of squares + eps) of a row, and the largest relative error with which a kernel has
// it.
struct RowScale {
  double inverse = 1;
  double error = 0;  // 0: a kernel has exactly `inverse`, and it is a power of two
};

// `divisor` is cols for the norm as it is defined; another one is how a wrong kernel would look
// (see discrimination in properties/).
inline RowScale row_scale(const double* row, std::int64_t cols, double eps, const Profile& profile,
                          double divisor) {
  const double u = 0x1p-24;
  double sum = 0;
  bool same_square = true;
  for (std::int64_t j = 0; j < cols; ++j) {
    sum += row[j] * row[j];
    same_square = same_square && row[j] * row[j] == row[0] * row[0];
  }
  const double mean = sum / divisor;

  // Exact data: all squares are one power of four, few enough for fp32 to add without rounding in
  // any order, their mean is a power of four again, and eps vanishes against it. Then
  // 1/sqrt(mean) is a power of two and the kernel makes no error at all before its last rounding.
  const std::optional<int> k = log4_of(mean);
  if (same_square && log4_of(row[0] * row[0]) && profile.terms <= (1 << 24) && k && eps < mean * u)
    return {std::ldexp(1.0, -*k), 0};

  const double variance = mean + eps;
  const std::int64_t depth = profile.depth + profile.all_reduce_terms - 1;
  // Error of the statistic (chain of sums; then division, eps), halved by the square root; of the
  // root and its reciprocal (one ulp is at most 2u); and of this very loop.
  const double statistic = chain_error(depth) * mean / variance + 3 * u;
  return {1.0 / std::sqrt(variance),
          statistic / 2 + (2 * profile.rsqrt_ulps + 0.1) * u + double(cols) * 0x1p-53};
}

// x [rows, cols], weight [1, cols]. `weight_error`: with which relative error a kernel has the
// weight (one rounding where it is 1 + w in fp32).
inline Budget rms_norm(const Matrix& x, const Matrix& weight, double eps, const Profile& profile,
                       double divisor, double weight_error = 0) {
  Budget out(x.rows, x.cols);
  const double u = 0x1p-24;
  for (std::int64_t i = 0; i < x.rows; ++i) {
    const double* row = x.row(i);
    const RowScale scale = row_scale(row, x.cols, eps, profile, divisor);
    for (std::int64_t j = 0; j < x.cols; ++j) {
      const double w = weight.values[std::size_t(j)];
      const double r = row[j] * scale.inverse * w;
      const std::size_t at = std::size_t(i * x.cols + j);
      out.r[at] = r;
      // With an exact scale one factor of the first product is a power of two, and the second
      // product is the last rounding: nothing is lost in fp32 either.
      const double weight_part = double(float(w)) == w ? 0 : weight_error;
      const double rel =
          scale.error == 0 ? weight_part : scale.error + 2 * u + weight_part;  // the two products
      // The last term is what underflow can take; nothing underflows where x is zero.
      out.rho[at] =
          row[j] == 0 || rel == 0 ? 0 : std::fabs(r) * rel + 0x1p-149 * (1 + std::fabs(w));
    }
  }
  return out;
}

// The sum that a norm with a residual takes, and writes: x + residual, rounded to the type of both.
// A kernel that adds in fp32 first rounds to the same value: 24 bits are twice the 11 of f16 and
// two more, and then rounding twice is rounding once (Figueroa, 1995). So there is no rho.
inline Matrix rounded_sum(DType t, const Matrix& x, const Matrix& residual) {
  Matrix sum(x.rows, x.cols);
  for (std::size_t i = 0; i < sum.values.size(); ++i)
    sum.values[i] = round_to(t, x.values[i] + residual.values[i]);
  return sum;
}

}  // namespace tp::reference
