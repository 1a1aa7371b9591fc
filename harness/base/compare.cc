#include "harness/base/compare.h"

#include <algorithm>
#include <cmath>

#include "harness/base/check.h"

namespace tp {

double chain_error(std::int64_t depth) {
  const double du = double(depth) * 0x1p-24;
  return du / (1 - du);
}

Comparison compare(DType t, const void* y, const Budget& budget) {
  Comparison result;
  for (std::int64_t i = 0; i < budget.rows * budget.cols; ++i) {
    const double got = load(t, y, i), r = budget.r[std::size_t(i)],
                 rho = budget.rho[std::size_t(i)];
    if (rho == HUGE_VAL) {
      ++result.unchecked;
      continue;
    }
    // What exact data are, all of them, and what needs no rounding of anything.
    if (got == r && rho >= 0 && std::isfinite(r) && std::signbit(got) == std::signbit(r)) continue;
    const double error = std::fabs(got - r);
    bool accepted;
    double lo = r, hi = r;
    if (!std::isfinite(r)) {  // only the very same special value will do, NaN included
      accepted = std::isnan(r) ? std::isnan(got) : got == r;
    } else {
      TP_CHECK(rho >= 0 && std::isfinite(rho), "the reference gave no budget");
      // Rounding is monotonic, so a value of t within rho of r needs no rounding of the ends.
      accepted = error <= rho && (rho > 0 || r != 0 || std::signbit(got) == std::signbit(r));
      if (!accepted) {
        lo = round_to(t, r - rho);
        hi = round_to(t, r + rho);
        accepted = lo <= got && got <= hi;
      }
      // Saturation is no error: what is beyond the type's largest number is meant to become that.
      const double beyond = t == DType::e4m3 ? std::max(0.0, std::fabs(r) - 448) : 0;
      if (std::isfinite(got) && error > beyond) {
        result.score =
            std::max(result.score, (error - beyond) / (rho + half_ulp(t, std::fabs(r) + rho)));
      }
    }
    if (!accepted) {
      if (!result.first) result.first = Mismatch{i / budget.cols, i % budget.cols, got, lo, hi, 0};
      ++result.first->count;
    }
  }
  return result;
}

}  // namespace tp
