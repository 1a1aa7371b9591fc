#pragma once
// f32, f16, bf16 and fp8 e4m3 on any machine, with integer operations only, so that host, emulator
// and GPU get the same bits (nvcc: --expt-relaxed-constexpr). All roundings are to nearest, ties to
// even. Beside them the whole numbers that quantised weights are packed into.

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <string_view>

#include "harness/base/check.h"

namespace tp {

// The first three are what activations may be; the others are how weights are kept.
enum class DType : std::uint8_t { f32, f16, bf16, e4m3, u8, i32 };

struct f16 {
  std::uint16_t bits = 0;
};
struct bf16 {
  std::uint16_t bits = 0;
};
// OCP 8-bit float E4M3 (NVIDIA's e4m3fn): no infinities, NaN is S.1111.111, the largest number 448.
struct e4m3 {
  std::uint8_t bits = 0;
};

// p: bits of the significand, the hidden one included. emin: exponent of the smallest normal
// number.
struct Format {
  int p;
  int emin;
  int emax;
  int bytes;
};

constexpr Format format_of(DType t) {
  switch (t) {
    case DType::f16:
      return {11, -14, 15, 2};
    case DType::bf16:
      return {8, -126, 127, 2};
    case DType::e4m3:
      return {4, -6, 8, 1};
    case DType::u8:
      return {8, 0, 7, 1};
    case DType::i32:
      return {31, 0, 30, 4};
    default:
      return {24, -126, 127, 4};
  }
}
constexpr int size_of(DType t) { return format_of(t).bytes; }
constexpr std::string_view name_of(DType t) {
  constexpr std::string_view kNames[] = {"f32", "f16", "bf16", "e4m3", "u8", "i32"};
  return kNames[int(t)];
}

template <typename T>
struct dtype_of;
template <>
struct dtype_of<float> {
  static constexpr DType value = DType::f32;
};
template <>
struct dtype_of<f16> {
  static constexpr DType value = DType::f16;
};
template <>
struct dtype_of<bf16> {
  static constexpr DType value = DType::bf16;
};
template <>
struct dtype_of<e4m3> {
  static constexpr DType value = DType::e4m3;
};
template <>
struct dtype_of<std::uint8_t> {
  static constexpr DType value = DType::u8;
};
template <>
struct dtype_of<std::int32_t> {
  static constexpr DType value = DType::i32;
};

constexpr float to_float(float x) { return x; }
constexpr float to_float(bf16 x) { return std::bit_cast<float>(std::uint32_t{x.bits} << 16); }
constexpr float to_float(f16 x) {
  const std::uint32_t sign = std::uint32_t(x.bits & 0x8000u) << 16;
  const std::uint32_t exponent = (x.bits >> 10) & 0x1Fu;
  const std::uint32_t fraction = x.bits & 0x3FFu;
  if (exponent == 0x1F) return std::bit_cast<float>(sign | 0x7F800000u | (fraction << 13));
  if (exponent != 0)
    return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (fraction << 13));
  const float magnitude = float(fraction) * 0x1p-24f;  // subnormal: exact
  return sign ? -magnitude : magnitude;
}

constexpr float to_float(e4m3 x) {
  const std::uint32_t sign = std::uint32_t(x.bits & 0x80u) << 24;
  const std::uint32_t exponent = (x.bits >> 3) & 0xFu;
  const std::uint32_t fraction = x.bits & 0x7u;
  if ((x.bits & 0x7Fu) == 0x7F) return std::bit_cast<float>(sign | 0x7FC00000u);
  if (exponent != 0)
    return std::bit_cast<float>(sign | ((exponent + 120) << 23) | (fraction << 20));
  const float magnitude = float(fraction) * 0x1p-9f;  // subnormal: exact
  return sign ? -magnitude : magnitude;
}
// E2M1, the four bits of NVFP4: 0 .. 2 in steps of 0.5, 3, 4 and 6, and a sign. (Not a table: nvcc
// has none in device code.)
constexpr float e2m1_to_float(unsigned bits) {
  const std::uint32_t sign = (bits & 8u) << 28, magnitude = bits & 7u;
  if (magnitude < 2) return std::bit_cast<float>(sign | (magnitude ? 0x3F000000u : 0u));
  return std::bit_cast<float>(sign | ((magnitude + 252) << 22));  // rebias 1 -> 127
}

template <typename T>
constexpr T from_float(float x);
template <>
constexpr float from_float<float>(float x) {
  return x;
}
template <>
constexpr bf16 from_float<bf16>(float x) {
  const std::uint32_t b = std::bit_cast<std::uint32_t>(x);
  if ((b & 0x7FFFFFFFu) > 0x7F800000u) return {std::uint16_t((b >> 16) | 0x40u)};  // quiet NaN
  return {std::uint16_t((b + 0x7FFFu + ((b >> 16) & 1u)) >> 16)};
}
template <>
constexpr f16 from_float<f16>(float x) {
  const std::uint32_t b = std::bit_cast<std::uint32_t>(x);
  const std::uint16_t sign = std::uint16_t((b >> 16) & 0x8000u);
  const std::uint32_t a = b & 0x7FFFFFFFu;
  if (a > 0x7F800000u) return {std::uint16_t(sign | 0x7E00u)};
  if (a >= 0x477FF000u)
    return {std::uint16_t(sign | 0x7C00u)};   // 65520 and above round to infinity
  if (a >= 0x38800000u) {                     // normal: 2^-14 and above
    const std::uint32_t r = a - 0x38000000u;  // rebias 127 -> 15
    return {std::uint16_t(sign | ((r + 0xFFFu + ((r >> 13) & 1u)) >> 13))};
  }
  if (a < 0x33000000u) return {sign};  // below half the smallest subnormal
  const std::uint32_t significand = (a & 0x7FFFFFu) | 0x800000u;
  const int shift = 126 - int(a >> 23);  // 14..24: bits below 2^-24
  const std::uint32_t kept = significand >> shift;
  const std::uint32_t rest = significand & ((1u << shift) - 1u);
  const std::uint32_t half = 1u << (shift - 1);
  return {std::uint16_t(sign | (kept + (rest > half || (rest == half && (kept & 1u)) ? 1u : 0u)))};
}

// Saturating, as quantisation wants it: whatever rounds to more than 448, infinities included,
// becomes 448. NaN stays NaN.
template <>
constexpr e4m3 from_float<e4m3>(float x) {
  const std::uint32_t b = std::bit_cast<std::uint32_t>(x);
  const std::uint8_t sign = std::uint8_t((b >> 24) & 0x80u);
  const std::uint32_t a = b & 0x7FFFFFFFu;
  if (a > 0x7F800000u) return {std::uint8_t(sign | 0x7Fu)};
  if (a >= 0x43E80000u) return {std::uint8_t(sign | 0x7Eu)};  // 464, the tie above 448, and above
  if (a >= 0x3C800000u) {                                     // normal: 2^-6 and above
    const std::uint32_t r = a - 0x3C000000u;                  // rebias 127 -> 7
    return {std::uint8_t(sign | ((r + 0x7FFFFu + ((r >> 20) & 1u)) >> 20))};
  }
  if (a < 0x3A800000u) return {sign};  // below half the smallest subnormal
  const std::uint32_t significand = (a & 0x7FFFFFu) | 0x800000u;
  const int shift = 141 - int(a >> 23);  // 21..24: bits below 2^-9
  const std::uint32_t kept = significand >> shift;
  const std::uint32_t rest = significand & ((1u << shift) - 1u);
  const std::uint32_t half = 1u << (shift - 1);
  return {std::uint8_t(sign | (kept + (rest > half || (rest == half && (kept & 1u)) ? 1u : 0u)))};
}

// An e4m3 as f16 or bf16, which have every value of it.
template <typename T>
constexpr T widened(e4m3 x);
template <>
constexpr bf16 widened<bf16>(e4m3 x) {
  return {std::uint16_t(std::bit_cast<std::uint32_t>(to_float(x)) >> 16)};
}
template <>
constexpr f16 widened<f16>(e4m3 x) {
  const std::uint32_t magnitude = x.bits & 0x7Fu;
  if (magnitude < 8 || magnitude == 0x7F) return from_float<f16>(to_float(x));   // subnormal or NaN
  return {std::uint16_t((x.bits & 0x80u) << 8 | ((magnitude << 7) + 0x2000u))};  // rebias 7 -> 15
}

// RN_t(x): x rounded once to `t`, with its overflow (of e4m3: saturation) and subnormals, as a
// double. Whole numbers stay as they are.
double round_to(DType t, double x);

// h_t(x) of research/numerics.md section 3: the largest error of rounding a value of size |x| to t.
double half_ulp(DType t, double x);

// Element i of an array of type t.
inline double load(DType t, const void* data, std::int64_t i) {
  switch (t) {
    case DType::f32:
      return static_cast<const float*>(data)[i];
    case DType::f16:
      return to_float(static_cast<const f16*>(data)[i]);
    case DType::bf16:
      return to_float(static_cast<const bf16*>(data)[i]);
    case DType::e4m3:
      return to_float(static_cast<const e4m3*>(data)[i]);
    case DType::u8:
      return static_cast<const std::uint8_t*>(data)[i];
    default:
      return static_cast<const std::int32_t*>(data)[i];
  }
}
// Stores x, which must already be a value of t (see round_to).
inline void store(DType t, void* data, std::int64_t i, double x) {
  switch (t) {
    case DType::f32:
      static_cast<float*>(data)[i] = float(x);
      break;
    case DType::f16:
      static_cast<f16*>(data)[i] = from_float<f16>(float(x));
      break;
    case DType::bf16:
      static_cast<bf16*>(data)[i] = from_float<bf16>(float(x));
      break;
    case DType::e4m3:
      static_cast<e4m3*>(data)[i] = from_float<e4m3>(float(x));
      break;
    case DType::u8:
      static_cast<std::uint8_t*>(data)[i] = std::uint8_t(x);
      break;
    default:
      static_cast<std::int32_t*>(data)[i] = std::int32_t(x);
      break;
  }
}

// Calls f with a value of the C++ type of t, a type of activations:
//   dispatch(t, [&]<typename T>(T) { ... });
template <typename F>
decltype(auto) dispatch(DType t, F&& f) {
  switch (t) {
    case DType::f32:
      return f(float{});
    case DType::f16:
      return f(f16{});
    case DType::bf16:
      return f(bf16{});
    default:
      die(__FILE__, __LINE__, "nobody computes with " + std::string(name_of(t)));
  }
}

}  // namespace tp
