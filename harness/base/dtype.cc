#include "harness/base/dtype.h"

namespace tp {

namespace {

// Exponent of |x| as the format sees it: subnormals share that of the smallest normal number.
int exponent_in(const Format& f, double magnitude) {
  const int e = int((std::bit_cast<std::uint64_t>(magnitude) >> 52) & 0x7FF) - 1023;
  return e < f.emin ? f.emin : e;
}

}  // namespace

double round_to(DType t, double x) {
  if (t == DType::f32) return float(x);
  if (t == DType::u8 || t == DType::i32) return x;
  if (std::isnan(x) || (std::isinf(x) && t != DType::e4m3)) return x;
  const Format f = format_of(t);
  const double magnitude = std::fabs(x);
  const double infinity =
      std::copysign(t == DType::e4m3 ? 448 : std::numeric_limits<double>::infinity(), x);
  // 2^(emax + 1); e4m3 has given the last number below it to NaN.
  const double limit = t == DType::f16 ? 0x1p16 : t == DType::e4m3 ? 480 : 0x1p128;
  if (magnitude >= limit) return infinity;
  // Adding and taking away 1.5 * 2^52 units rounds to the nearest unit, ties to even (Dekker).
  const double unit =
      std::bit_cast<double>(std::uint64_t(exponent_in(f, magnitude) - f.p + 1 + 1023) << 52);
  const double anchor = 0x1.8p52 * unit;
  const double rounded = (magnitude + anchor) - anchor;
  return rounded >= limit ? infinity : std::copysign(rounded, x);
}

double half_ulp(DType t, double x) {
  const Format f = format_of(t);
  const int e = exponent_in(f, std::fabs(x)) - f.p;
  return e > -1022 ? std::bit_cast<double>(std::uint64_t(e + 1023) << 52) : std::ldexp(1.0, e);
}

}  // namespace tp
