#pragma once
// The output gate of an attention block in double: out = x * sigmoid(gate), and its budget. The
// block's other stages have references of their own.

#include <cmath>

#include "harness/base/compare.h"
#include "harness/base/tensor.h"

namespace tp::reference {

// x, gate [tokens, num_heads * v_head_dim].
inline Budget output_gate(const Matrix& x, const Matrix& gate) {
  const double u = 0x1p-24;
  Budget out(x.rows, x.cols);
  for (std::size_t i = 0; i < x.values.size(); ++i) {
    const double g = gate.values[i], e = std::exp(-g), sigmoid = 1 / (1 + e);
    const double r = x.values[i] * sigmoid;
    out.r[i] = r;
    // exp of 2 ulp, one ulp being at most 2u, as far as it weighs in 1 + e; that sum, the quotient
    // and the product. Where e is beyond fp32 the gate may be 0 altogether; the product may be
    // subnormal.
    const double rel = 4 * u * (e / (1 + e)) + 3 * u + 8 * 0x1p-53;
    out.rho[i] = x.values[i] == 0 ? 0
                 : g < -87.3      ? std::fabs(r) + 0x1p-149
                                  : std::fabs(r) * rel + 0x1p-149;
  }
  return out;
}

}  // namespace tp::reference
