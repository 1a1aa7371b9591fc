#pragma once
// Quantisation to e4m3 in double, and how far a correct kernel's quotients may be off before they
// are rounded (numerics.md 5.6).

#include <cstdint>
#include <vector>

#include "harness/base/compare.h"
#include "harness/base/tensor.h"
#include "reference/scaled_product.h"

namespace tp::reference {

// The scale that the largest |x| makes: max(maximum, least) / 448, one division in fp32. Bitwise.
double scale_of(double maximum);

// max |x| over a matrix; NaN if any element is.
double absolute_maximum(const Matrix& x);

// The scales of blocks of block_cols columns of each row, of which the first has lost first_col
// columns. A row's own scale: block_cols = x.cols, first_col = 0. Bitwise: a budget of nothing.
Budget token_scales(const Matrix& x, std::int64_t block_cols, std::int64_t first_col);

// x / scale, to be compared as e4m3. The scales are the kernel's own.
Budget quantised(const Matrix& x, const Factors& scales);

// codes * slots[slot_of_row[row]] / scale, to be compared as e4m3.
Budget requantised(const Matrix& codes, const std::vector<std::int32_t>& slot_of_row,
                   const std::vector<double>& slots, double scale);

// codes[i][k] * factor, kept in type t: what a weight is before it meets activations that were not
// quantised. A product of a code and a scale is exact in double, so this has the kernel's bits.
Matrix dequantised(DType t, const Matrix& codes, const Factors& scales);

}  // namespace tp::reference
