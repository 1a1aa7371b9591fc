#pragma once
// f32, f16 and bf16 on any machine, with integer operations only, so that host, emulator and GPU
// get the same bits (nvcc: --expt-relaxed-constexpr). All roundings are to nearest, ties to even.

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string_view>

namespace tp {

enum class DType : std::uint8_t { f32, f16, bf16 };

struct f16 {
  std::uint16_t bits = 0;
};
struct bf16 {
  std::uint16_t bits = 0;
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
    default:
      return {24, -126, 127, 4};
  }
}
constexpr int size_of(DType t) { return format_of(t).bytes; }
constexpr std::string_view name_of(DType t) {
  return t == DType::f32 ? "f32" : t == DType::f16 ? "f16" : "bf16";
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

// RN_t(x): x rounded once to `t`, with its overflow and subnormals, as a double.
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
    default:
      return to_float(static_cast<const bf16*>(data)[i]);
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
    default:
      static_cast<bf16*>(data)[i] = from_float<bf16>(float(x));
      break;
  }
}

// Calls f with a value of the C++ type of t: dispatch(t, [&]<typename T>(T) { ... }).
template <typename F>
decltype(auto) dispatch(DType t, F&& f) {
  switch (t) {
    case DType::f32:
      return f(float{});
    case DType::f16:
      return f(f16{});
    default:
      return f(bf16{});
  }
}

}  // namespace tp
