#pragma once
// Sums of products in double, and how far a correct kernel's may be off: ACC and STORE of
// research/numerics.md section 4. Linear layers, adapters and scores are made of them.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "harness/base/compare.h"
#include "harness/base/shape.h"
#include "harness/base/tensor.h"

namespace tp::reference {

// A value, and the largest error that a correct kernel can have made up to here.
struct Bounded {
  double r = 0;
  double rho = 0;
};

// The largest q such that v, a normal number or zero, is a multiple of 2^q; of zero, which is a
// multiple of all of them, a large one.
inline int least_bit(double v) {
  const auto bits = std::bit_cast<std::uint64_t>(v);
  if (bits << 1 == 0) return 4096;
  const int exponent = int(bits >> 52 & 0x7FF) - 1023;
  const std::uint64_t significand = (bits & ((std::uint64_t{1} << 52) - 1)) | std::uint64_t{1}
                                                                                  << 52;
  return exponent - 52 + std::countr_zero(significand);
}

// Of each row: all its elements in `cols` are multiples of 2^q.
inline std::vector<int> least_bits(const Matrix& m, Shard cols) {
  std::vector<int> bits;
  for (std::int64_t i = 0; i < m.rows; ++i) {
    int least = least_bit(0);
    for (std::int64_t j = cols.offset; j < cols.end(); ++j)
      least = std::min(least, least_bit(m.row(i)[j]));
    bits.push_back(least);
  }
  return bits;
}

// Of each row: an element in `cols` is smaller than `least`, and not zero.
inline std::vector<bool> have_smaller(const Matrix& m, Shard cols, double least) {
  std::vector<bool> found;
  for (std::int64_t i = 0; i < m.rows; ++i) {
    const double* first = m.row(i) + cols.offset;
    found.push_back(least > 0 && std::any_of(first, first + cols.size, [least](double v) {
                      return v != 0 && std::fabs(v) < least;
                    }));
  }
  return found;
}

// Whether fp32 adds multiples of 2^q up without any rounding, in any order: every partial sum is a
// multiple of 2^q, too, and none exceeds the sum of magnitudes. What a matrix step shifts and cuts
// off is less than 2^q then, so there is nothing there; unless it takes a product to be larger than
// that (see Accumulation), which is why `magnitude` is no less than what the products are taken
// for.
inline bool adds_exactly(double magnitude, int q, int bits = 24) {
  return q >= -149 && magnitude <= std::ldexp(1.0, bits + q);
}

// Bits that narrow steps (Accumulation) keep of the largest of their terms, and products of one.
inline constexpr int kNarrowBits = 14, kNarrowStep = 32;

// How far sum_k a[k] b[k] of narrow steps may be off (numerics.md section 4). Each step aligns its
// products and the accumulator to the largest of them and cuts off what is below its 13th fraction
// bit: with l that bit's value, up to l of each term, l / 2 in the mean and always toward zero. So
// what positive products lose negative ones make good (the bias), and what is left of the products'
// errors, uniform in [0, l) and independent, has the variance of a step's 33 terms, l^2 / 12 each:
// eight standard deviations of it; the accumulator's own, at most l in a step; and half as much of
// all again, for operands that are not spread evenly.
inline double narrow_error(const double* a, const double* b, std::int64_t n) {
  double prefix = 0, bias = 0, own = 0, variance = 0;
  for (std::int64_t first = 0; first < n; first += kNarrowStep) {
    double largest = std::fabs(prefix), sum = 0;
    int net = 0;
    for (std::int64_t k = first; k < std::min(n, first + kNarrowStep); ++k) {
      const double product = a[k] * b[k];
      largest = std::max(largest, std::fabs(product));
      sum += product;
      net += (product > 0) - (product < 0);
    }
    prefix += sum;
    if (largest == 0) continue;
    const double last = std::ldexp(1.0, std::ilogb(largest) - (kNarrowBits - 1));
    bias += last * net / 2;
    own += last;
    variance += (kNarrowStep + 1) * last * last / 12;
  }
  return 1.5 * (std::fabs(bias) + own + 8 * std::sqrt(variance));
}

// sum_k a[k] b[k], k < n, added up in fp32. All products are multiples of 2^q. `has_subnormal`:
// whether any operand may be smaller than accumulation.least_normal.
inline Bounded sum_of_products(const double* a, const double* b, std::int64_t n, int q,
                               const Accumulation& accumulation, bool has_subnormal = false) {
  constexpr int kLanes = 4;  // a chain each, so that a processor need not wait for the last sum
  double sums[kLanes] = {}, magnitudes[kLanes] = {};
  std::int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const double product = a[k + lane] * b[k + lane];  // exact: 48 bits at most
      sums[lane] += product;
      magnitudes[lane] += std::fabs(product);
    }
  }
  for (; k < n; ++k) {
    sums[0] += a[k] * b[k];
    magnitudes[0] += std::fabs(a[k] * b[k]);
  }
  const double r = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  const double s = (magnitudes[0] + magnitudes[1]) + (magnitudes[2] + magnitudes[3]);
  double raised = 0;
  for (k = 0; k < n && has_subnormal; ++k) raised += accumulation.raised(a[k], b[k]);
  const bool narrow = accumulation.narrow_steps;
  if (adds_exactly(std::max(s, raised), q, narrow ? kNarrowBits : 24)) return {r, 0};
  // The kernel's roundings; this very loop's; and what underflow can take at each step, of which
  // there are as many as products where several chains meet.
  const double wide = accumulation.error() * s + accumulation.cut(raised);
  return {r, (narrow ? std::max(wide, narrow_error(a, b, n)) : wide) + double(n) * 0x1p-53 * s +
                 double(std::max(accumulation.depth, n)) * 0x1p-149};
}

// v + addend, added in fp32. `is_last`: this rounding is the output's own, which compare() knows.
inline Bounded plus(const Bounded& v, double addend, bool is_last) {
  const double r = v.r + addend;
  const bool is_exact_here = r - v.r == addend && r - addend == v.r;
  if (v.rho == 0 && is_exact_here && (is_last || double(float(r)) == r)) return {r, 0};
  const double rounding = is_last ? 0 : 0x1p-24 * (std::fabs(r) + v.rho) + 0x1p-150;
  return {r, v.rho + rounding + 0x1p-53 * std::fabs(r)};
}

// v kept in type t on its way.
inline Bounded stored(DType t, const Bounded& v) {
  if (v.rho == 0 && round_to(t, v.r) == v.r) return v;
  return {v.r, v.rho + half_ulp(t, std::fabs(v.r) + v.rho)};
}

// out[i][j] = sum_k x[i][k] w[j][k] (+ bias[0][j]) over the columns k of `inner`, before anything
// is stored. `bias`: nullptr where there is none; `bias_is_last`: see plus().
inline Budget product(const Matrix& x, const Matrix& w, Shard inner, const Matrix* bias,
                      const Accumulation& accumulation, bool bias_is_last) {
  Budget out(x.rows, w.rows);
  const std::vector<int> x_bits = least_bits(x, inner), w_bits = least_bits(w, inner);
  const double least = accumulation.least_normal;
  const std::vector<bool> x_small = have_smaller(x, inner, least),
                          w_small = have_smaller(w, inner, least);
  for (std::int64_t i = 0; i < x.rows; ++i) {
    for (std::int64_t j = 0; j < w.rows; ++j) {
      Bounded v = sum_of_products(x.row(i) + inner.offset, w.row(j) + inner.offset, inner.size,
                                  x_bits[std::size_t(i)] + w_bits[std::size_t(j)], accumulation,
                                  x_small[std::size_t(i)] || w_small[std::size_t(j)]);
      if (bias != nullptr) v = plus(v, bias->values[std::size_t(j)], bias_is_last);
      out.r[std::size_t(i * w.rows + j)] = v.r;
      out.rho[std::size_t(i * w.rows + j)] = v.rho;
    }
  }
  return out;
}

}  // namespace tp::reference
