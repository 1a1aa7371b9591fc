#pragma once
// Sums of products of codes, scaled block by block, in double, and how far a correct kernel's may
// be off (numerics.md 5.2 and 5.6).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "harness/base/compare.h"
#include "harness/base/dtype.h"
#include "harness/base/shape.h"
#include "harness/base/tensor.h"
#include "reference/product.h"

namespace tp::reference {

// What the codes of a matrix are multiplied with, all of them floats: the element in row i and
// column k has values[i][(k + first_col) / cols_per]. One row of values is for all rows.
struct Factors {
  const Matrix* values = nullptr;  // nullptr: the codes are the values
  std::int64_t cols_per = 0;       // 0: all columns have the same
  std::int64_t first_col = 0;

  double at(std::int64_t row, std::int64_t col) const {
    if (values == nullptr) return 1;
    return values->row(values->rows == 1 ? 0
                                         : row)[cols_per == 0 ? 0 : (col + first_col) / cols_per];
  }
  // The first column that has not the factor of column `col` (or `end`).
  std::int64_t border(std::int64_t col, std::int64_t end) const {
    if (values == nullptr || cols_per == 0) return end;
    return std::min(end, ((col + first_col) / cols_per + 1) * cols_per - first_col);
  }
};

// The columns of `inner` between which no factor changes.
inline std::vector<Shard> blocks_of(const Factors& x, const Factors& w, Shard inner) {
  std::vector<Shard> blocks;
  for (std::int64_t col = inner.offset; col < inner.end(); col = blocks.back().end()) {
    const std::int64_t end = std::min(x.border(col, inner.end()), w.border(col, inner.end()));
    blocks.push_back({col, end - col});
  }
  return blocks;
}

// Sum of p_b s_b over blocks b, where p_b is a block's sum of products, known within rho_b, and s_b
// the product of its two scales, as fp32 makes it.
//
// A kernel has p'_b = p_b + e_b with |e_b| <= rho_b, and s'_b = s_b (1 + d) + f with |d| <= u and
// |f| <= 2^-150 (underflow); both are 0 where s_b is a float. It adds the terms p'_b s'_b up, each
// by an fmaf, in any order. A term passes `depth` roundings at most, that of the output's own type,
// if the last fmaf has it, not counted. So the error is at most
//   sum_b |s_b| rho_b + (|p_b| + rho_b) |s'_b - s_b|          (of the terms)
//   + g(depth) sum_b (|p_b| + rho_b) (|s_b| + |s'_b - s_b|)   (of adding them up: Higham)
//   + depth 2^-149                                            (underflow on the way)
//   + (2 B + 1) 2^-53 sum_b |p_b s_b|                         (of this very sum, in double)
// and 0 where every p_b and s_b is exact and fp32 adds the terms up without a rounding.
class ScaledSum {
 public:
  void add(const Bounded& p, double x_factor, double w_factor) {
    const double s = x_factor * w_factor;  // exact: 48 bits
    const bool is_float = double(float(s)) == s;
    const double of_s = is_float ? 0 : 0x1p-24 * std::fabs(s) + 0x1p-150;
    const double term = p.r * s;
    r_ += term;
    magnitude_ += std::fabs(term);
    terms_ += std::fabs(s) * p.rho + (std::fabs(p.r) + p.rho) * of_s;
    largest_ += (std::fabs(p.r) + p.rho) * (std::fabs(s) + of_s);
    // r of 24 bits, times s of 24: no bit of the term is lost.
    exact_ = exact_ && p.rho == 0 && is_float;
    least_ = std::min(least_, term_bit(p.r, s));
    ++blocks_;
  }
  Bounded sum(std::int64_t depth) const {
    if (exact_ && adds_exactly(magnitude_, least_)) return {r_, 0};
    return {r_, terms_ + chain_error(depth) * largest_ + double(depth) * 0x1p-149 +
                    double(2 * blocks_ + 1) * 0x1p-53 * magnitude_};
  }

 private:
  static int term_bit(double p, double s) {
    return p == 0 || s == 0 ? least_bit(0) : least_bit(p) + least_bit(s);
  }

  double r_ = 0, magnitude_ = 0, terms_ = 0, largest_ = 0;
  bool exact_ = true;
  int least_ = least_bit(0);
  std::int64_t blocks_ = 0;
};

// out[i][j] = sum over blocks b of the columns of `inner` (x_factor[i][b] * w_factor[j][b]) *
// (sum over k in b of x[i][k] w[j][k]) (+ bias[0][j]), before anything is stored. `accumulation`:
// of the longest block. `is_last`: the last rounding in fp32 (of the bias, or of the last block
// where there is none) is the output's own, which compare() knows.
inline Budget scaled_product(const Matrix& x, const Factors& x_factors, const Matrix& w,
                             const Factors& w_factors, Shard inner, const Matrix* bias,
                             const Accumulation& accumulation, bool is_last) {
  const std::vector<Shard> blocks = blocks_of(x_factors, w_factors, inner);
  const std::int64_t depth = std::int64_t(blocks.size()) - (is_last && bias == nullptr);
  const std::size_t size = std::size_t(x.rows * w.rows);
  std::vector<ScaledSum> sums(size);
  for (const Shard& block : blocks) {
    const Budget part = product(x, w, block, nullptr, accumulation, false);
    std::vector<double> of_w;
    for (std::int64_t j = 0; j < w.rows; ++j) of_w.push_back(w_factors.at(j, block.offset));
    for (std::int64_t i = 0; i < x.rows; ++i) {
      const double of_x = x_factors.at(i, block.offset);
      for (std::int64_t j = 0; j < w.rows; ++j) {
        const std::size_t at = std::size_t(i * w.rows + j);
        sums[at].add({part.r[at], part.rho[at]}, of_x, of_w[std::size_t(j)]);
      }
    }
  }
  Budget out(x.rows, w.rows);
  for (std::size_t at = 0; at < size; ++at) {
    Bounded v = sums[at].sum(depth);
    if (bias != nullptr) v = plus(v, bias->values[at % std::size_t(w.rows)], is_last);
    out.r[at] = v.r;
    out.rho[at] = v.rho;
  }
  return out;
}

}  // namespace tp::reference
