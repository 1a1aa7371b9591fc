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

// The value of an e4m3 pattern below NaN, from the list of what its exponents mean.
double e4m3_value(int bits) {
  double unit = 0x1p-9;  // of the subnormals and of the first normal numbers
  for (int exponent = 2; exponent <= bits / 8 % 16; ++exponent) unit *= 2;
  const double magnitude = unit * (bits % 8 + (bits / 8 % 16 > 0 ? 8 : 0));
  return bits < 128 ? magnitude : -magnitude;
}

TEST(E4m3, EveryPatternHasItsValueAndComesBack) {
  for (int bits = 0; bits < 256; ++bits) {
    const e4m3 x{std::uint8_t(bits)};
    if (bits % 128 == 127) {
      EXPECT_TRUE(std::isnan(to_float(x)));
      EXPECT_EQ(std::signbit(to_float(x)), bits == 255);
      EXPECT_EQ(from_float<e4m3>(to_float(x)).bits, bits);
      EXPECT_TRUE(std::isnan(to_float(widened<f16>(x))));
      EXPECT_TRUE(std::isnan(to_float(widened<bf16>(x))));
      continue;
    }
    const double expected = e4m3_value(bits);
    EXPECT_EQ(double(to_float(x)), expected) << bits;
    EXPECT_EQ(std::signbit(to_float(x)), bits >= 128) << bits;
    EXPECT_EQ(from_float<e4m3>(to_float(x)).bits, bits) << bits;
    EXPECT_EQ(round_to(DType::e4m3, expected), expected) << bits;
    EXPECT_EQ(widened<f16>(x).bits, from_float<f16>(float(expected)).bits) << bits;
    EXPECT_EQ(widened<bf16>(x).bits, from_float<bf16>(float(expected)).bits) << bits;
    std::uint8_t array[2] = {0xEE, 0xEE};
    store(DType::e4m3, array, 1, expected);
    EXPECT_EQ(array[0], 0xEE);
    EXPECT_EQ(array[1], bits);
    EXPECT_EQ(load(DType::e4m3, array, 1), expected);
  }
  EXPECT_EQ(e4m3_value(0x7E), 448);
  EXPECT_EQ(e4m3_value(0x38), 1);
  EXPECT_EQ(e4m3_value(0x01), 0x1p-9);
}

// Between every two neighbours: just below the middle, the middle (ties to even), just above.
TEST(E4m3, EveryGapRoundsToNearestEven) {
  for (int bits = 0; bits < 0x7E; ++bits) {
    const double lo = e4m3_value(bits), hi = e4m3_value(bits + 1), middle = (lo + hi) / 2;
    const int even = bits + bits % 2;
    for (const int sign : {0, 128}) {
      const auto expect = [&](double x, int code) {
        const double v = sign ? -x : x;
        EXPECT_EQ(int(from_float<e4m3>(float(v)).bits), code | sign) << v;
        EXPECT_EQ(round_to(DType::e4m3, v), e4m3_value(code | sign)) << v;
        EXPECT_EQ(std::signbit(round_to(DType::e4m3, v)), sign != 0) << v;
      };
      expect(std::nextafterf(float(lo), INFINITY), bits);
      expect(std::nextafterf(float(middle), 0), bits);
      expect(middle, even);
      expect(std::nextafterf(float(middle), INFINITY), bits + 1);
      expect(std::nextafterf(float(hi), 0), bits + 1);
    }
    // A double that is no float is rounded once.
    EXPECT_EQ(round_to(DType::e4m3, std::nextafter(middle, 0)), lo);
    EXPECT_EQ(round_to(DType::e4m3, std::nextafter(middle, INFINITY)), hi);
  }
}

TEST(E4m3, Saturates) {
  for (const float x : {448.0f, 463.99997f, 464.0f, 464.00003f, 479.9f, 480.0f, 496.0f, 512.0f,
                        1e30f, 3.4e38f, INFINITY}) {
    for (const float sign : {1.0f, -1.0f}) {
      EXPECT_EQ(to_float(from_float<e4m3>(sign * x)), sign * 448) << x;
      EXPECT_EQ(round_to(DType::e4m3, double(sign) * x), sign * 448) << x;
    }
  }
  EXPECT_EQ(round_to(DType::e4m3, 1e300), 448);
  EXPECT_TRUE(std::isnan(round_to(DType::e4m3, NAN)));
  EXPECT_EQ(from_float<e4m3>(NAN).bits, 0x7F);
  EXPECT_EQ(from_float<e4m3>(std::bit_cast<float>(0xFF800001u)).bits, 0xFF);  // a signalling one
}

TEST(E2m1, EveryPatternHasItsValue) {
  const float expected[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  for (unsigned bits = 0; bits < 16; ++bits) {
    EXPECT_EQ(e2m1_to_float(bits), bits < 8 ? expected[bits] : -expected[bits - 8]) << bits;
    EXPECT_EQ(std::signbit(e2m1_to_float(bits)), bits >= 8) << bits;
  }
}

TEST(Dtype, WholeNumbersStayAsTheyAre) {
  EXPECT_EQ(round_to(DType::u8, 255), 255);
  EXPECT_EQ(round_to(DType::i32, -2147483648.0), -2147483648.0);
  std::int32_t words[2] = {};
  store(DType::i32, words, 1, -2147483648.0);
  EXPECT_EQ(load(DType::i32, words, 1), -2147483648.0);
  std::uint8_t bytes[2] = {};
  store(DType::u8, bytes, 1, 255);
  EXPECT_EQ(load(DType::u8, bytes, 1), 255);
}

TEST(Dtype, HalfUlpIsTheLargestErrorOfRounding) {
  for (const DType t : {DType::f32, DType::f16, DType::bf16, DType::e4m3}) {
    double largest = 0;
    for (std::uint64_t i = 0; i < 100000; ++i) {
      const Random4 r = philox(1, 2, i);
      const double x = std::ldexp(1.0 + r[0] * 0x1p-32, int(r[1] % 40) - 30);
      if (t == DType::e4m3 && x > 464) continue;  // it saturates
      const double ratio = std::fabs(round_to(t, x) - x) / half_ulp(t, x);
      ASSERT_LE(ratio, 1.0) << name_of(t) << " " << x;
      largest = std::max(largest, ratio);
    }
    EXPECT_GT(largest, 0.99) << name_of(t);
  }
  EXPECT_EQ(half_ulp(DType::f16, 0), 0x1p-25);
  EXPECT_EQ(half_ulp(DType::bf16, 1.5), 0x1p-8);
  EXPECT_EQ(half_ulp(DType::e4m3, 0), 0x1p-10);
  EXPECT_EQ(half_ulp(DType::e4m3, 0x1p-6), 0x1p-10);
  EXPECT_EQ(half_ulp(DType::e4m3, 448), 16);
}

}  // namespace
}  // namespace tp
