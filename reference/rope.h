#pragma once
// Rotary position embedding in double, on one rank, and the budget of a correct kernel (Su et al.,
// arXiv 2104.09864). A pair (x1, x2) of a head, at an angle of which the table has c and s, becomes
//   (x1 c - x2 s, x2 c + x1 s).
// Before it, where the model has it, the RMSNorm of the head; nothing is rounded between.

#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "harness/base/compare.h"
#include "harness/base/tensor.h"
#include "reference/rms_norm.h"

namespace tp::reference {

struct RopeShape {
  std::int64_t head_dim = 1;
  std::int64_t rotary_dim = 2;  // of the first columns of a head; even
  bool interleaved = false;     // pairs (2 i, 2 i + 1); otherwise (i, i + rotary_dim / 2)
};

struct RopeNorm {
  double eps = 0;
  Profile profile;
  const Matrix* weight = nullptr;  // [1, head_dim]; null: no weight
  double weight_offset = 0;        // the factor is weight_offset + weight
};

namespace rope_detail {

// A number as a kernel has it in fp32: `value`, less or more of it by `own` (relative; its own
// roundings) and by the error of the head's scale, which all numbers of the head have in common.
struct Factor {
  double value = 0;
  double own = 0;
};

inline bool fits_fp32(double v) { return double(float(v)) == v; }

// Of the product or sum of two numbers of fp32: whether fp32 has exactly a + b. Doubles of 24 bits
// whose sum double does not have exactly are farther apart than fp32 could have either.
inline bool exact_sum(double a, double b) {
  const double sum = a + b, back = sum - a;
  return (a - (sum - back)) + (b - back) == 0 && fits_fp32(sum);
}

}  // namespace rope_detail

// x [tokens, heads * head_dim], cos_sin [positions, rotary_dim]: cosines, then sines; one of its
// rows a token in `rows`.
//
// The budget. With the head's norm n = x * inverse * w in fp32: `inverse` has the relative error e
// (see row_scale), the same for all of a head; each product one rounding of n's own, 1 + w one
// more. A rotated value r = a - b, a = n1 c, b = n2 s. The common error moves r by e |r|; the own
// errors, and a rounding of a and of b (a kernel with fmaf has only one of the two), move it by
// g(k) (|a| + |b|), not by g(k) |r|: a and b may cancel. The sum is rounded once, u |r|, before it
// is rounded to its type. Nothing at all is lost where the scale is exact and a, b and r are
// numbers of fp32: exact data, the columns that pass without a norm, and position 0.
inline Budget rope(const Matrix& x, const Matrix& cos_sin, const std::vector<std::int32_t>& rows,
                   const RopeShape& shape, const std::optional<RopeNorm>& norm) {
  using namespace rope_detail;
  const double u = 0x1p-24, tiny = 0x1p-149;
  const std::int64_t dim = shape.head_dim, pairs = shape.rotary_dim / 2;
  Budget out(x.rows, x.cols);
  std::vector<Factor> n(static_cast<std::size_t>(dim));
  for (std::int64_t i = 0; i < x.rows; ++i) {
    const double* cosines = cos_sin.row(rows[std::size_t(i)]);
    const double* sines = cosines + pairs;
    for (std::int64_t first = 0; first < x.cols; first += dim) {
      const double* head = x.row(i) + first;
      RowScale scale;
      if (norm) scale = row_scale(head, dim, norm->eps, norm->profile, double(dim));
      double largest_weight = 1;
      for (std::int64_t j = 0; j < dim; ++j) {
        Factor& f = n[std::size_t(j)];
        f = {head[j], 0};
        if (!norm) continue;
        const double w = norm->weight == nullptr
                             ? 1
                             : norm->weight_offset + norm->weight->values[std::size_t(j)];
        largest_weight = std::max(largest_weight, std::fabs(w));
        f.value = head[j] * scale.inverse * w;
        const bool exact = head[j] == 0 || (scale.error == 0 && fits_fp32(w) && fits_fp32(f.value));
        const int roundings =
            1 + (norm->weight != nullptr) + (norm->weight_offset != 0 && norm->weight != nullptr);
        f.own = exact ? 0 : chain_error(roundings);
      }
      const auto put = [&](std::int64_t j, double r, double rho) {
        out.r[std::size_t(i * x.cols + first + j)] = r;
        out.rho[std::size_t(i * x.cols + first + j)] = rho;
      };
      // The most that underflow can take of x * inverse, of the products and of the sum.
      const double underflow = tiny * (2 + largest_weight);
      // a + b, where a = f1 * t1 and b = f2 * t2.
      const auto rotated = [&](std::int64_t j, Factor f1, double t1, Factor f2, double t2) {
        const double a = f1.value * t1, b = f2.value * t2, r = a + b;
        const bool head_is_exact = scale.error == 0 || (f1.value == 0 && f2.value == 0);
        if (head_is_exact && f1.own == 0 && f2.own == 0 && fits_fp32(a) && fits_fp32(b) &&
            exact_sum(a, b))
          return put(j, r, 0);
        const double size_a = std::fabs(a), size_b = std::fabs(b);
        const double own = (f1.own + u) * size_a + (f2.own + u) * size_b;
        put(j, r,
            scale.error * std::fabs(r) + (1 + scale.error + 4 * u) * own +
                u * (std::fabs(r) + scale.error * (size_a + size_b)) +
                double(dim + 4) * 0x1p-53 * (size_a + size_b) + underflow);
      };
      for (std::int64_t p = 0; p < pairs; ++p) {
        const std::int64_t one = shape.interleaved ? 2 * p : p,
                           other = shape.interleaved ? 2 * p + 1 : p + pairs;
        const Factor f1 = n[std::size_t(one)], f2 = n[std::size_t(other)];
        rotated(one, f1, cosines[p], f2, -sines[p]);
        rotated(other, f2, cosines[p], f1, sines[p]);
      }
      for (std::int64_t j = shape.rotary_dim; j < dim; ++j) {
        const Factor f = n[std::size_t(j)];
        const bool exact = f.value == 0 || (scale.error == 0 && f.own == 0);
        put(j, f.value,
            exact ? 0
                  : std::fabs(f.value) * (scale.error + f.own * (1 + scale.error) + 4 * 0x1p-53) +
                        underflow);
      }
    }
  }
  return out;
}

}  // namespace tp::reference
