#include "harness/base/dtype.h"

#include <gtest/gtest.h>

#include <cmath>

#include "harness/base/philox.h"

namespace tp {
namespace {

// The value of a bit pattern, by the definition of the format and not by the code under test.
double value_of(const Format& f, std::uint32_t bits) {
  const int fraction_bits = f.p - 1, exponent_bits = 16 - f.p;
  const double sign = bits >> 15 ? -1 : 1;
  const int exponent = int(bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const int fraction = int(bits) & ((1 << fraction_bits) - 1);
  if (exponent == (1 << exponent_bits) - 1) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, f.emin - fraction_bits);
  return sign * std::ldexp((1 << fraction_bits) + fraction, exponent - 1 + f.emin - fraction_bits);
}

template <typename T>
class SixteenBits : public testing::Test {};
using Types = testing::Types<f16, bf16>;
TYPED_TEST_SUITE(SixteenBits, Types);

TYPED_TEST(SixteenBits, EveryPatternHasItsValueAndComesBack) {
  constexpr DType t = dtype_of<TypeParam>::value;
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const TypeParam x{std::uint16_t(bits)};
    const double expected = value_of(format_of(t), bits);
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(to_float(x))) << std::hex << bits;
      EXPECT_TRUE(std::isnan(to_float(from_float<TypeParam>(to_float(x))))) << std::hex << bits;
      continue;
    }
    ASSERT_EQ(double(to_float(x)), expected) << std::hex << bits;
    ASSERT_EQ(from_float<TypeParam>(to_float(x)).bits, bits) << std::hex << bits;
    ASSERT_EQ(round_to(t, expected), expected) << std::hex << bits;
  }
}

// Between every two neighbours: just below the middle, the middle (ties to even), just above.
TYPED_TEST(SixteenBits, EveryGapRoundsToNearestEven) {
  constexpr DType t = dtype_of<TypeParam>::value;
  const Format f = format_of(t);
  const std::uint32_t infinity = (0x7FFFu >> (f.p - 1)) << (f.p - 1);
  for (std::uint32_t bits = 0; bits < infinity; ++bits) {
    const double lo = value_of(f, bits);
    // Above the largest number the next one would be 2^(emax + 1): the middle goes to infinity.
    const double hi = bits + 1 < infinity ? value_of(f, bits + 1) : std::ldexp(1.0, f.emax + 1);
    const float middle = float((lo + hi) / 2);
    ASSERT_EQ(double(middle), (lo + hi) / 2);
    const std::uint32_t even = bits % 2 == 0 ? bits : bits + 1;
    const float below = std::nextafterf(middle, 0), above = std::nextafterf(middle, INFINITY);
    for (const float sign : {1.0f, -1.0f}) {
      const std::uint32_t s = sign < 0 ? 0x8000u : 0;
      ASSERT_EQ(from_float<TypeParam>(sign * below).bits, bits | s) << middle;
      ASSERT_EQ(from_float<TypeParam>(sign * middle).bits, even | s) << middle;
      ASSERT_EQ(from_float<TypeParam>(sign * above).bits, (bits + 1) | s) << middle;
      ASSERT_EQ(round_to(t, double(sign) * std::nextafter(double(middle), 0)),
                value_of(f, bits | s));
      ASSERT_EQ(round_to(t, double(sign) * middle), value_of(f, even | s));
      ASSERT_EQ(round_to(t, double(sign) * std::nextafter(double(middle), INFINITY)),
                value_of(f, (bits + 1) | s));
    }
  }
}

TEST(Dtype, HalfUlpIsTheLargestErrorOfRounding) {
  for (const DType t : {DType::f32, DType::f16, DType::bf16}) {
    double largest = 0;
    for (std::uint64_t i = 0; i < 100000; ++i) {
      const Random4 r = philox(1, 2, i);
      const double x = std::ldexp(1.0 + r[0] * 0x1p-32, int(r[1] % 40) - 30);
      const double ratio = std::fabs(round_to(t, x) - x) / half_ulp(t, x);
      ASSERT_LE(ratio, 1.0) << name_of(t) << " " << x;
      largest = std::max(largest, ratio);
    }
    EXPECT_GT(largest, 0.99) << name_of(t);
  }
  EXPECT_EQ(half_ulp(DType::f16, 0), 0x1p-25);
  EXPECT_EQ(half_ulp(DType::bf16, 1.5), 0x1p-8);
}

}  // namespace
}  // namespace tp
