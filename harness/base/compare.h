#pragma once
// The decision: is an output the rounding of some value within the budget? (numerics.md sections 1,
// 4)
//
// There is no atol and no rtol. The reference gives, per element, the value r and the radius rho:
// the largest error a correct kernel of the declared precision may have before its last rounding.
// An element y of type t passes iff RN_t(r - rho) <= y <= RN_t(r + rho); rho = 0 is bitwise
// equality.

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

// How a kernel adds products up: in a chain of `depth` fp32 roundings to nearest, or in `depth` matrix
// steps (tensor cores). A step aligns 16 products and the accumulator to the largest of them and
// truncates there and in the sum (numerics.md section 3, measured on H100 with mma.sync).
struct Accumulation {
  std::int64_t depth = 0;  // what the first product passes
  bool matrix_steps = false;

  // Largest error of the sum, relative to the sum of the products' magnitudes.
  double error() const {
    return matrix_steps ? double(depth) * (17 * 0x1p-25 + 0x1p-23) : chain_error(depth);
  }
};

struct AttentionProfile {
  Accumulation qk, pv;
  DType p = DType::f32;
  std::int64_t kv_tile = 64;
  int splits = 1;
};

// Value and radius of every element of a matrix, row-major.
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
  // Largest |y - r| / (rho + h_t(|r| + rho)); for reports and ranking only, <= 1 whenever accepted.
  double score = 0;
};

// `y`: rows x cols values of type t, row-major and contiguous.
Comparison compare(DType t, const void* y, const Budget& budget);

}  // namespace tp
