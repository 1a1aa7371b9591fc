#pragma once
// The decision: is an output the rounding of some value within the budget? (numerics.md sections 1,
// 4)
//
// There is no atol and no rtol. The reference gives, per element, the value r and the radius rho:
// the largest error a correct kernel of the declared precision may have before its last rounding.
// An element y of type t passes iff RN_t(r - rho) <= y <= RN_t(r + rho); rho = 0 is bitwise
// equality.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "harness/base/dtype.h"

namespace tp {

// What a kernel declares about its arithmetic. Computed from the case by the kernel's own header.
struct Profile {
  std::int64_t depth = 0;    // longest chain of fp32 roundings a product passes on one rank
  int all_reduce_terms = 1;  // summands of the fp32 all-reduce: adds terms - 1 to the chain
  std::int64_t terms = 0;    // squares (or products) summed over all ranks, replicas counted
  double rsqrt_ulps = 2;     // error of 1/sqrt in fp32, one ulp being at most 2^-23 relative
};

// g(d) = d u / (1 - d u): the relative error of a chain of d roundings to nearest in fp32 (Higham).
double chain_error(std::int64_t depth);

// How a kernel adds products up: in a chain of `depth` fp32 roundings to nearest, or in `depth`
// matrix steps (tensor cores). A step aligns 16 products and the accumulator to the largest of them
// and truncates there and in the sum (numerics.md section 3, measured on H100 with mma.sync). It
// takes the exponent of a product to be the sum of its operands', and that of a subnormal operand
// to be the smallest normal one: such a product counts as larger than it is, and more is cut off.
struct Accumulation {
  std::int64_t depth = 0;  // what the first product passes
  bool matrix_steps = false;
  double least_normal = 0;  // the smallest normal operand, where a matrix step multiplies them
  // The steps may also be Hopper's own of e4m3: 32 products each, of which 13 fraction bits are
  // kept (numerics.md section 3; cuBLASLt's "fast accumulation").
  bool narrow_steps = false;

  // What a step cuts off of its terms, relative to the largest of them.
  static constexpr double kCut = 17 * 0x1p-25;

  // Largest error of the sum, relative to the sum of the products' magnitudes.
  double error() const {
    if (!matrix_steps) return chain_error(depth);
    const double e = double(depth) * (kCut + 0x1p-23);
    return e / (1 - e);
  }
  // How large a matrix step takes a product of a subnormal operand to be; 0 for any other.
  double raised(double a, double b) const {
    a = std::fabs(a), b = std::fabs(b);
    if (a == 0 || b == 0 || (a >= least_normal && b >= least_normal)) return 0;
    return std::max(a, least_normal) * std::max(b, least_normal);
  }
  // What steps cut off because of such products, `sum` being the sum of them as they are taken: in
  // each step no more than the largest of its own.
  double cut(double sum) const { return (1 + error()) * kCut * sum; }
};

// Whether the rounding of v to type t is within the budget (r, rho): what compare() asks of y.
inline bool accepts(DType t, double v, double r, double rho) {
  const double y = round_to(t, v);
  return round_to(t, r - rho) <= y && y <= round_to(t, r + rho);
}

// What an attention kernel declares about its arithmetic. All of them work online, tile of keys by
// tile of keys, in fp32: scores are differences from the running maximum when they meet exp (so the
// maximum itself weighs exactly 1), the row sum adds the weights before these are rounded to `p`,
// and a sink joins when all keys have been seen. Exponents may be base e or base 2.
struct AttentionProfile {
  Accumulation qk;                   // a score: over head_dim
  Accumulation pv;                   // an output, rescaling apart: over the longest visible range
  std::int64_t sum_depth = 1 << 24;  // longest chain of additions in the row sum; at most its keys
  DType p = DType::f32;       // what weights are rounded to before the product with v; f32: nothing
  std::int64_t kv_tile = 64;  // keys between two rescalings of the partial sums
  int merges = 0;  // further rescalings of a partial sum (warps that meet with their own maxima)
  int splits = 1;  // normalised partial outputs that are merged by their LSE
  double exp_ulps = 2, tanh_ulps = 2, log_ulps = 2;  // errors, one ulp being at most 2^-23 relative
};

// Value and radius of every element of a matrix, row-major. An infinite radius: the element is not
// checked, because a declared intermediate (a partial sum in 16 bits) may overflow where the result
// does not.
struct Budget {
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::vector<double> r;
  std::vector<double> rho;

  Budget(std::int64_t rows, std::int64_t cols)
      : rows(rows), cols(cols), r(std::size_t(rows * cols)), rho(std::size_t(rows * cols)) {}
};

struct Mismatch {
  std::int64_t row = 0;
  std::int64_t col = 0;
  double got = 0;
  double lo = 0;  // accepted: lo .. hi
  double hi = 0;
  std::int64_t count = 0;  // elements that were rejected
};

struct Comparison {
  std::optional<Mismatch> first;  // the first rejected element in row-major order
  std::int64_t unchecked = 0;
  // Largest |y - r| / (rho + h_t(|r| + rho)); for reports and ranking only, <= 1 whenever accepted.
  double score = 0;
};

// `y`: rows x cols values of type t, row-major and contiguous.
Comparison compare(DType t, const void* y, const Budget& budget);

}  // namespace tp
