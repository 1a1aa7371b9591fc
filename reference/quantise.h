#pragma once
// Quantisation to e4m3 in double, and how far a correct kernel's quotients may be off before they
// are rounded (numerics.md 5.6).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "harness/base/compare.h"
#include "harness/base/dtype.h"
#include "harness/base/tensor.h"
#include "reference/scaled_product.h"

namespace tp::reference {

// The scale that the largest |x| makes: one division in fp32, of no less than what keeps the scale
// a normal number. Bitwise.
inline double scale_of(double maximum) {
  constexpr float kLargest = 448, kLeastMaximum = kLargest * 0x1p-126f;
  return std::max(float(maximum), kLeastMaximum) / kLargest;  // NaN if `maximum` is
}

// max |x| over some columns of a row, or `so_far`; NaN if any of them is.
inline double absolute_maximum(const double* row, std::int64_t count, double so_far = 0) {
  for (std::int64_t k = 0; k < count; ++k) {
    const double magnitude = std::fabs(row[k]);
    if (magnitude > so_far || std::isnan(magnitude)) so_far = magnitude;
  }
  return so_far;
}
inline double absolute_maximum(const Matrix& x) {
  return absolute_maximum(x.values.data(), std::int64_t(x.values.size()));
}

// The scales of blocks of block_cols columns of each row, of which the first has lost first_col
// columns. A row's own scale: block_cols = x.cols, first_col = 0. Bitwise: a budget of nothing.
inline Budget token_scales(const Matrix& x, std::int64_t block_cols, std::int64_t first_col) {
  Budget out(x.rows, (first_col + x.cols + block_cols - 1) / block_cols);
  for (std::int64_t i = 0; i < x.rows; ++i) {
    for (std::int64_t block = 0; block < out.cols; ++block) {
      const std::int64_t first = std::max<std::int64_t>(0, block * block_cols - first_col),
                         end = std::min(x.cols, (block + 1) * block_cols - first_col);
      out.r[std::size_t(i * out.cols + block)] =
          scale_of(absolute_maximum(x.row(i) + first, end - first));
    }
  }
  return out;
}

// What fp32 makes of the exact quotient r: x / scale, x * (1 / scale), and with a product before
// either are at most 4 u off (numerics.md 5.6), and nothing at all where everything is a power of
// two, or a multiple of one that fits. `underflow`: what a product below the normal numbers may
// have lost. What leaves e4m3's range saturates: from here on it is the largest number, which
// brings no two values farther apart.
inline Bounded quotient(double r, bool by_powers_of_two, double underflow) {
  constexpr double kLargest = 448;
  if (std::isnan(r)) return {r, 0};
  if (by_powers_of_two && double(float(r)) == r) return {std::clamp(r, -kLargest, kLargest), 0};
  r = std::clamp(r, -kLargest, kLargest);
  return {r, 4 * 0x1p-24 * std::fabs(r) + 0x1p-149 + underflow};
}
inline bool is_power_of_two(double v) {
  int exponent;
  return std::fabs(std::frexp(v, &exponent)) == 0.5;
}

// x / scale, to be compared as e4m3. The scales are the kernel's own.
inline Budget quantised(const Matrix& x, const Factors& scales) {
  Budget out(x.rows, x.cols);
  for (std::int64_t i = 0; i < x.rows; ++i) {
    for (std::int64_t first = 0, end; first < x.cols; first = end) {
      end = scales.border(first, x.cols);
      const double scale = scales.at(i, first);
      const bool by_power = is_power_of_two(scale);
      for (std::int64_t k = first; k < end; ++k) {
        const Bounded v = quotient(x.row(i)[k] / scale, by_power, 0);
        out.r[std::size_t(i * x.cols + k)] = v.r;
        out.rho[std::size_t(i * x.cols + k)] = v.rho;
      }
    }
  }
  return out;
}

// codes * slots[slot_of_row[row]] / scale, to be compared as e4m3.
inline Budget requantised(const Matrix& codes, const std::vector<std::int32_t>& slot_of_row,
                          const std::vector<double>& slots, double scale) {
  Budget out(codes.rows, codes.cols);
  for (std::int64_t i = 0; i < codes.rows; ++i) {
    const double slot = slots[std::size_t(slot_of_row[std::size_t(i)])];
    const bool by_powers = is_power_of_two(slot) && is_power_of_two(scale);
    for (std::int64_t k = 0; k < codes.cols; ++k) {
      const double product = codes.row(i)[k] * slot;  // exact
      const bool may_underflow = product != 0 && std::fabs(product) < 0x1p-126;
      const Bounded v = quotient(product / scale, by_powers && !may_underflow,
                                 may_underflow ? 0x1p-149 / std::fabs(scale) : 0);
      out.r[std::size_t(i * codes.cols + k)] = v.r;
      out.rho[std::size_t(i * codes.cols + k)] = v.rho;
    }
  }
  return out;
}

// codes[i][k] * factor, kept in type t: what a weight is before it meets activations that were not
// quantised. A product of a code and a scale is exact in double, so this has the kernel's bits.
inline Matrix dequantised(DType t, const Matrix& codes, const Factors& scales) {
  Matrix out(codes.rows, codes.cols);
  for (std::int64_t i = 0; i < codes.rows; ++i)
    for (std::int64_t k = 0; k < codes.cols; ++k)
      out.row(i)[k] = round_to(t, codes.row(i)[k] * scales.at(i, k));
  return out;
}

}  // namespace tp::reference
