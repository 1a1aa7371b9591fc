#pragma once
// Tensor cores of the emulator: a lane loads what is its own, and a product is a meeting of the
// warp.

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "harness/device/emulator/mma.h"
#include "harness/device/emulator/warp_functions.h"
#include "harness/device/matrix.h"

namespace tp::emulator {

template <typename T>
void check_tile(const T* tile, int stride, const char* what, Where where) {
  static_assert(sizeof(T) == 2);
  check_aligned(tile, 16, what, where);
  check_aligned(tile + stride, 16, what, where);
}

// Two neighbours in memory, the first in the low half.
template <typename T>
std::uint32_t load_pair(const T* first) {
  std::uint32_t pair;
  std::memcpy(&pair, first, 4);
  return pair;
}
template <typename T>
std::uint32_t pack(T low, T high) {
  return std::uint32_t(low.bits) | std::uint32_t(high.bits) << 16;
}

}  // namespace tp::emulator

namespace tp {

template <typename T>
inline FragmentA<T> load_a(const T* tile, int stride, Where where) {
  emulator::check_tile(tile, stride, "load_a", where);
  const T* upper = tile + int(emulator::lane() / 4) * stride + emulator::lane() % 4 * 2;
  const T* lower = upper + 8 * stride;
  return {{emulator::load_pair(upper), emulator::load_pair(lower), emulator::load_pair(upper + 8),
           emulator::load_pair(lower + 8)}};
}
template <typename T>
inline FragmentB<T> load_b(const T* tile, int stride, Where where) {
  emulator::check_tile(tile, stride, "load_b", where);
  const T* row = tile + int(emulator::lane() / 4) * stride + emulator::lane() % 4 * 2;
  return {{emulator::load_pair(row), emulator::load_pair(row + 8)}};
}
template <typename T>
inline FragmentB<T> load_b_transposed(const T* tile, int stride, Where where) {
  emulator::check_tile(tile, stride, "load_b_transposed", where);
  const T* top = tile + int(emulator::lane() % 4 * 2) * stride + emulator::lane() / 4;
  const T* bottom = top + 8 * stride;
  return {{emulator::pack(top[0], top[stride]), emulator::pack(bottom[0], bottom[stride])}};
}
template <typename T>
inline FragmentB2<T> load_b2(const T* tile, int stride, Where where) {
  return {{load_b(tile, stride, where), load_b(tile + 16, stride, where)}};
}
template <typename T>
inline FragmentB2<T> load_b2_transposed(const T* tile, int stride, Where where) {
  return {{load_b_transposed(tile, stride, where), load_b_transposed(tile + 8, stride, where)}};
}

template <typename T>
inline void mma(FragmentC& c, const FragmentA<T>& a, const FragmentB<T>& b, Where where) {
  static_assert(std::is_same_v<T, f16> || std::is_same_v<T, bf16>);
  const auto& operation = std::is_same_v<T, f16> ? emulator::kMmaF16 : emulator::kMmaBf16;
  const emulator::MmaOperands operands{a.x, b.x, c.x};
  emulator::meet(operation, 0xFFFFFFFFu, reinterpret_cast<std::uintptr_t>(&operands), 0, where);
}

template <typename T>
inline std::uint32_t round_pair(float low, float high) {
  const auto rounded = [](float value) {
    return value == value ? from_float<T>(value) : T{std::uint16_t{0x7FFF}};
  };
  return emulator::pack(rounded(low), rounded(high));
}

template <typename T>
inline FragmentA<T> to_a(const FragmentC& left, const FragmentC& right) {
  return {{round_pair<T>(left.x[0], left.x[1]), round_pair<T>(left.x[2], left.x[3]),
           round_pair<T>(right.x[0], right.x[1]), round_pair<T>(right.x[2], right.x[3])}};
}

inline void widen_codes(std::uint32_t codes, std::uint32_t& first, std::uint32_t& second) {
  const auto wide = [codes](int i) { return widened<f16>(e4m3{std::uint8_t(codes >> 8 * i)}); };
  first = emulator::pack(wide(0), wide(1));
  second = emulator::pack(wide(2), wide(3));
}

inline std::uint16_t codes_of(float first, float second) {
  const auto code = [](float x) {
    return std::uint32_t{x == x ? from_float<e4m3>(x).bits : std::uint8_t{0x7F}};
  };
  return std::uint16_t(code(first) | code(second) << 8);
}

inline float quad_sum(float value, Where where) {
  using namespace emulator;
  return from_bits<float>(meet(kQuadSum, 0xFFFFFFFFu, to_bits(value), 0, where));
}
inline float quad_max(float value, Where where) {
  using namespace emulator;
  return from_bits<float>(meet(kQuadMax, 0xFFFFFFFFu, to_bits(value), 0, where));
}

}  // namespace tp
