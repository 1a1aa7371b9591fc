#pragma once
// A linear layer whose input is cut into runs of columns: each run's product is rounded, and the
// partial sums are added up. Where it is cut is part of the declared arithmetic, because that is
// where it rounds; what a rank is, the reference does not know.

#include <vector>

#include "reference/product.h"

namespace tp::reference {

// What is declared of the sum: partial sums in type `partial`, added one after another with a
// rounding to that type each, and the total rounded to type `out`.
struct RowLinearTypes {
  DType partial = DType::f32;
  DType out = DType::f32;
};

// Whether the last rounding of a run's product is the output's own, which compare() knows.
inline bool run_is_last(std::size_t runs, const RowLinearTypes& types) {
  return runs == 1 && types.out == DType::f32;
}

// out = sum of the runs' products, none of which has been stored. numerics.md section 5.3.
inline Budget sum_of_runs(const std::vector<Budget>& runs, const RowLinearTypes& types) {
  Budget out(runs.front().rows, runs.front().cols);
  const std::size_t size = out.r.size();
  const bool one_run = runs.size() == 1;
  // Sums of what may be above zero and of what may be below it, and the partial sums' least bit.
  std::vector<double> above(size), below(size);
  std::vector<int> least(size, least_bit(0));
  for (const Budget& part : runs) {
    for (std::size_t i = 0; i < size; ++i) {
      Bounded v{part.r[i], part.rho[i]};
      // A single partial sum is stored as the output is; and in fp32 it is already.
      if (!one_run && types.partial != DType::f32) v = stored(types.partial, v);
      out.r[i] += v.r;
      out.rho[i] += v.rho;
      above[i] += std::max(0.0, v.r + v.rho);
      below[i] += std::max(0.0, v.rho - v.r);
      least[i] = std::min(least[i], least_bit(v.r));
    }
  }
  if (one_run) return out;

  // The last addition's rounding is the output's own, if they have one type.
  const double roundings = double(runs.size()) - (types.partial == types.out ? 2 : 1);
  const int p = format_of(types.partial).p;
  for (std::size_t i = 0; i < size; ++i) {
    // Every partial sum of any order lies within [-largest, largest], but for roundings before it.
    double largest = std::max(above[i], below[i]);
    if (std::isinf(round_to(types.partial, largest))) {
      // A sum on the way may overflow, whatever the last one is.
      out.rho[i] = HUGE_VAL;
      continue;
    }
    if (out.rho[i] == 0 && largest <= std::ldexp(1.0, p + least[i])) continue;
    largest += roundings * half_ulp(types.partial, largest);
    out.rho[i] += roundings * half_ulp(types.partial, largest) +
                  double(runs.size()) * 0x1p-53 * (above[i] + below[i]);
  }
  return out;
}

}  // namespace tp::reference
