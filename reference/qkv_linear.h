#pragma once
// The query, key and value projections of a token: three linear layers. It knows neither of ranks
// nor of the one fused weight that a rank makes of its parts.

#include "reference/product.h"

namespace tp::reference {

// x [tokens, hidden_size] times one projection's weight [rows, hidden_size], plus its bias [1,
// rows] or nullptr; out of type t. numerics.md section 5.2.
inline Budget projection(const Matrix& x, const Matrix& weight, const Matrix* bias,
                         const Accumulation& accumulation, DType t) {
  // fp32 is added and stored as one: the bias's rounding is the output's.
  return product(x, weight, {0, x.cols}, bias, accumulation, t == DType::f32);
}

}  // namespace tp::reference
