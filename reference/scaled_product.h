#pragma once
// Sums of products of codes, scaled block by block, in double, and how far a correct kernel's may
// be off (numerics.md 5.2 and 5.6).

#include <cstdint>

#include "harness/base/compare.h"
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
};

// out[i][j] = sum over blocks b of the columns of `inner` (x_factor[i][b] * w_factor[j][b]) *
// (sum over k in b of x[i][k] w[j][k]) (+ bias[0][j]), before anything is stored. `accumulation`:
// of the longest block. `is_last`: the last rounding in fp32 (of the bias, or of the last block
// where there is none) is the output's own, which compare() knows.
Budget scaled_product(const Matrix& x, const Factors& x_factors, const Matrix& w,
                      const Factors& w_factors, Shard inner, const Matrix* bias,
                      const Accumulation& accumulation, bool is_last);

}  // namespace tp::reference
