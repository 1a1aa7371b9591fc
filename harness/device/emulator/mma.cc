// The arithmetic of an H100's tensor cores (matrix.h), as published and validated against the
// hardware by github.com/north-numerical-computing/MATLAB-tensor-core (Generic_BFMA_TC.m, H100TC.m)
// and probed by us (research/numerics.md section 3): of a term a * b the exponent is that of a plus
// that of b, subnormal operands have the smallest normal exponent, and nothing is normalised before
// the sum.

#include "harness/device/emulator/mma.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "harness/base/dtype.h"
#include "harness/device/sanitizer.h"

namespace tp::emulator {
namespace {

constexpr int kRows = 16, kColumns = 8, kDepth = 16;
constexpr int kFraction = 25;           // bits kept below the largest exponent
constexpr int kSmallestLargest = -133;  // no largest exponent counts as less

// Exponents of zero, and of infinities and NaNs: sums of two and the largest of sums tell them from
// all others, whatever is added.
constexpr std::int16_t kNone = -8192;
constexpr std::int16_t kSpecial = 16000;
constexpr bool is_none(int exponent) { return exponent < -4000; }
constexpr bool is_special(int exponent) { return exponent > 4000; }

// Largest exponents for which fp32 and int32 arithmetic is exact where it must be.
constexpr int kFastLow = -100, kFastHigh = 120;

// A warp's operands, unpacked. One place for all products, since kernel threads have small stacks
// and a place in the cache is worth much.
struct Operands {
  alignas(16) float a[kRows][kDepth];
  alignas(16) float b[kDepth][kColumns];
  alignas(16) float c[kRows][kColumns];
  alignas(16) std::int16_t a_exponent[kRows][kDepth];
  alignas(16) std::int16_t b_exponent[kDepth][kColumns];
  alignas(16) std::int16_t c_exponent[kRows][kColumns];
  // As the lanes bring them: pairs along k. b is by columns here.
  std::uint32_t a_pairs[kRows][kDepth / 2];
  std::uint32_t b_pairs[kColumns][kDepth / 2];
  std::uint16_t bits[kRows * kDepth];
  std::uint16_t turned[kDepth * kColumns];
  float result[kRows][kColumns];
};
Operands operands;

// Conversions of whole arrays, without branches, so that compilers use vectors.
void expand(const std::uint16_t* bits, int count, bf16, float* values, std::int16_t* exponents) {
  for (int i = 0; i < count; ++i) {
    const std::uint32_t wide = std::uint32_t(bits[i]) << 16;
    values[i] = std::bit_cast<float>(wide);
  }
  for (int i = 0; i < count; ++i) {
    const std::int16_t field = std::int16_t(bits[i] >> 7 & 0xFF);
    const std::int16_t nonzero = std::int16_t((bits[i] & 0x7FFF) == 0 ? kNone : 0);
    const std::int16_t special = std::int16_t(field == 0xFF ? kSpecial : 0);
    exponents[i] = std::int16_t((field == 0 ? 1 : field) - 127 + nonzero + special);
  }
}
void expand(const std::uint16_t* bits, int count, f16, float* values, std::int16_t* exponents) {
  for (int i = 0; i < count; ++i) {
    const std::uint32_t sign = std::uint32_t(bits[i] & 0x8000) << 16;
    const std::uint32_t magnitude = bits[i] & 0x7FFF;
    // The exponents of both formats are biased 112 apart, those of subnormals, too.
    const float finite_value = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
    const auto finite = std::bit_cast<std::uint32_t>(finite_value);
    const std::uint32_t special = magnitude >= 0x7C00 ? 0x7F800000u : 0u;
    values[i] = std::bit_cast<float>(sign | finite | special);
  }
  for (int i = 0; i < count; ++i) {
    const std::int16_t field = std::int16_t(bits[i] >> 10 & 0x1F);
    const std::int16_t nonzero = std::int16_t((bits[i] & 0x7FFF) == 0 ? kNone : 0);
    const std::int16_t special = std::int16_t(field == 0x1F ? kSpecial : 0);
    exponents[i] = std::int16_t((field == 0 ? 1 : field) - 15 + nonzero + special);
  }
}
std::int16_t exponent_of(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value) & 0x7FFFFFFFu;
  const int field = int(bits >> 23);
  if (bits == 0) return kNone;
  if (field == 0xFF) return kSpecial;
  return std::int16_t(std::max(field, 1) - 127);
}

// x cut to fp32's significand, overflow to infinity: the tensor cores' own.
float truncated(double x) {
  if (x == 0) return 0.0f;
  const double unit = std::ldexp(1.0, std::max(std::ilogb(x), -126) - 23);
  const double cut = std::trunc(x / unit) * unit;
  if (std::abs(cut) > double(std::numeric_limits<float>::max())) {
    return std::copysign(std::numeric_limits<float>::infinity(), float(x));
  }
  return float(cut);
}

// One element, for any operands.
float element(int row, int column, int largest) {
  const float c = operands.c[row][column];
  double sum = 0.0;
  if (is_special(largest)) {  // adding up tells which infinity, or NaN
    for (int k = 0; k < kDepth; ++k) {
      sum += double(operands.a[row][k]) * double(operands.b[k][column]);
    }
    sum += double(c);
    return std::isnan(sum) ? std::bit_cast<float>(0x7FFFFFFFu) : float(sum);
  }
  const double unit = std::ldexp(1.0, std::max(largest, kSmallestLargest) - kFraction);
  for (int k = 0; k < kDepth; ++k) {
    sum += std::trunc(double(operands.a[row][k]) * double(operands.b[k][column]) / unit);
  }
  sum += std::trunc(double(c) / unit);
  return truncated(sum * unit);
}

// Vectors of 16 bytes, which every processor of interest has.
using Floats [[gnu::vector_size(16)]] = float;
using Ints [[gnu::vector_size(16)]] = std::int32_t;
using Shorts [[gnu::vector_size(16)]] = std::int16_t;
template <typename Vector, typename T>
Vector load(const T* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

// The largest exponent of the terms of each element of a row.
Shorts largest_exponents(int row) {
  Shorts largest = load<Shorts>(operands.c_exponent[row]);
  for (int k = 0; k < kDepth; ++k) {
    const Shorts sum = load<Shorts>(operands.b_exponent[k]) + operands.a_exponent[row][k];
    largest = sum > largest ? sum : largest;
  }
  return largest;
}

// Four elements of a row, if their largest exponents allow it: what element() does, in vectors.
void fast_elements(int row, int column, const std::int16_t* largest, float* result) {
  const Ints exponents = {largest[0], largest[1], largest[2], largest[3]};
  const Ints scale_bits = (127 + kFraction - exponents) << 23;
  const auto scale = std::bit_cast<Floats>(scale_bits);
  const auto term = [&](int k) {
    const Floats product = load<Floats>(&operands.b[k][column]) * operands.a[row][k];
    return __builtin_convertvector(product * scale, Ints);
  };
  // A term is less than 2^27 (c: 2^26), so a sum of 8 of them and c fits in 32 bits.
  Ints low = __builtin_convertvector(load<Floats>(&operands.c[row][column]) * scale, Ints);
  Ints high = {};
  for (int k = 0; k < kDepth / 2; ++k) {
    low += term(k);
    high += term(k + kDepth / 2);
  }
  for (int n = 0; n < 4; ++n) {
    const double sum = double(low[n]) + double(high[n]);
    const std::uint64_t cut = std::bit_cast<std::uint64_t>(sum) & ~((std::uint64_t{1} << 29) - 1);
    const std::uint64_t unit = std::uint64_t(1023 - kFraction + largest[n]) << 52;
    result[n] = float(std::bit_cast<double>(cut) * std::bit_cast<double>(unit));
  }
}

// Whether nothing is added to a row of c: one of zeros, beyond the few tokens that a batch has.
bool is_row_of_zeros(int row) {
  std::uint32_t any = 0;
  for (const std::uint32_t pair : operands.a_pairs[row]) any |= pair & 0x7FFF7FFFu;
  return any == 0;
}

template <typename T>
void gather(const std::uint64_t* value) {
  auto& a = operands.a_pairs;
  auto& b = operands.b_pairs;
  for (int lane = 0; lane < 32; ++lane) {
    const auto& from = *reinterpret_cast<const MmaOperands*>(value[lane]);
    const int g = lane / 4, t = lane % 4;
    a[g][t] = from.a[0];
    a[g + 8][t] = from.a[1];
    a[g][t + 4] = from.a[2];
    a[g + 8][t + 4] = from.a[3];
    b[g][t] = from.b[0];
    b[g][t + 4] = from.b[1];
    std::memcpy(&operands.c[g][2 * t], from.c, 8);
    std::memcpy(&operands.c[g + 8][2 * t], from.c + 2, 8);
  }
  auto& bits = operands.bits;
  std::memcpy(bits, a, sizeof(a));
  expand(bits, kRows * kDepth, T{}, operands.a[0], operands.a_exponent[0]);
  std::memcpy(bits, b, sizeof(b));
  auto& turned = operands.turned;
  for (int k = 0; k < kDepth; ++k) {
    for (int n = 0; n < kColumns; ++n) turned[k * kColumns + n] = bits[n * kDepth + k];
  }
  expand(turned, kDepth * kColumns, T{}, operands.b[0], operands.b_exponent[0]);
  for (int i = 0; i < kRows; ++i) {
    for (int n = 0; n < kColumns; ++n) {
      operands.c_exponent[i][n] = exponent_of(operands.c[i][n]);
    }
  }
}

template <typename T>
bool multiply(std::uint64_t* value, const std::uint32_t*, std::uint32_t) {
  const Overlooked overlooked;
  gather<T>(value);
  auto& result = operands.result;
  const auto special = [](const auto& exponents) {
    return std::any_of(std::begin(exponents), std::end(exponents),
                       [](int exponent) { return is_special(exponent); });
  };
  const bool finite_b =
      std::none_of(std::begin(operands.b_exponent), std::end(operands.b_exponent), special);
  for (int i = 0; i < kRows; ++i) {
    if (finite_b && is_row_of_zeros(i) && !special(operands.c_exponent[i])) {
      // c is exact in any unit; a sum of zeros is +0.
      for (int n = 0; n < kColumns; ++n) result[i][n] = operands.c[i][n] + 0.0f;
      continue;
    }
    const Shorts exponents = largest_exponents(i);
    std::int16_t largest[kColumns];
    bool fast = true;
    for (int n = 0; n < kColumns; ++n) {
      largest[n] = is_none(exponents[n]) ? std::int16_t(0) : exponents[n];  // nothing but zeros
      fast &= kFastLow <= largest[n] && largest[n] <= kFastHigh;
    }
    if (fast) {
      for (int n = 0; n < kColumns; n += 4) {
        fast_elements(i, n, largest + n, &result[i][n]);
      }
    } else {
      for (int n = 0; n < kColumns; ++n) result[i][n] = element(i, n, largest[n]);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& to = *reinterpret_cast<const MmaOperands*>(value[lane]);
    std::memcpy(to.c, &result[lane / 4][lane % 4 * 2], 8);
    std::memcpy(to.c + 2, &result[lane / 4 + 8][lane % 4 * 2], 8);
  }
  return true;
}

}  // namespace

const WarpOperation kMmaF16{"mma", false, multiply<f16>};
const WarpOperation kMmaBf16{"mma", false, multiply<bf16>};

}  // namespace tp::emulator
