#pragma once
// Pieces of rows in registers: vectors of T kept as 32-bit words, two elements in a word or one of
// fp32 (nvcc takes wide loads apart otherwise).

#include <bit>
#include <cstdint>
#include <type_traits>

#include "harness/device/device.h"

namespace tp {

// Elements of the widest load.
template <typename T>
constexpr int kWide = 16 / int(sizeof(T));

template <typename T, int N = kWide<T>>
using Words = Vec<std::uint32_t, int{sizeof(T)} * N / 4>;

template <typename T>
bool has_aligned_rows(const View<T>& m) {
  return reinterpret_cast<std::uintptr_t>(m.data) % 16 == 0 && m.row_stride * sizeof(T) % 16 == 0;
}

// The address must be aligned to N elements.
template <typename T, int N = kWide<T>>
__device__ Words<T, N> load_words(const T* from) {
  return std::bit_cast<Words<T, N>>(load_vector<T, N>(from));
}
template <typename T, int N = kWide<T>>
__device__ void store_words(T* to, const Words<T, N>& words) {
  store_vector(to, std::bit_cast<Vec<T, N>>(words));
}

template <typename T, int Count>
__device__ float element(const Vec<std::uint32_t, Count>& words, int e) {
  if constexpr (std::is_same_v<T, float>) {
    return std::bit_cast<float>(words[e]);
  } else {
    return to_float(T{std::uint16_t(words[e / 2] >> 16 * (e % 2))});
  }
}

// value(e) of each of the N elements, rounded to T once.
template <typename T, int N = kWide<T>, typename F>
__device__ Words<T, N> words_of(F value) {
  Words<T, N> words;
#pragma unroll
  for (int e = 0; e < N; ++e) {
    if constexpr (std::is_same_v<T, float>) {
      words[e] = std::bit_cast<std::uint32_t>(value(e));
    } else if (e % 2 == 1) {
      words[e / 2] = round_pair<T>(value(e - 1), value(e));
    }
  }
  return words;
}

}  // namespace tp
