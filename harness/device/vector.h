#pragma once
// Loads and stores of several values at once. Included by device.h.

#include <cstddef>
#include <cstdint>

namespace tp {

// N values of T that are read and written as one: 2, 4, 8 or 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  static_assert(sizeof(T) * N <= 16 && (sizeof(T) * N & (sizeof(T) * N - 1)) == 0);
  T values[N];

  __host__ __device__ T& operator[](int i) { return values[i]; }
  __host__ __device__ const T& operator[](int i) const { return values[i]; }
};

// The address must be aligned to the whole vector; the emulator says so if it is not.
template <typename T, int N>
__device__ inline Vec<T, N> load_vector(const T* source, Where where = Where::here()) {
  check_aligned(source, sizeof(Vec<T, N>), "load_vector", where);
  return *reinterpret_cast<const Vec<T, N>*>(source);  // an aggregate of T may alias T
}
template <typename T, int N>
__device__ inline void store_vector(T* destination, const Vec<T, N>& value,
                                    Where where = Where::here()) {
  check_aligned(destination, sizeof(value), "store_vector", where);
  *reinterpret_cast<Vec<T, N>*>(destination) = value;
}

// Two floats rounded to T (f16 or bf16), `low` in the low half: as from_float does, but that every
// NaN becomes 0x7FFF. Defined by the dialects.
template <typename T>
__device__ std::uint32_t round_pair(float low, float high);

}  // namespace tp
