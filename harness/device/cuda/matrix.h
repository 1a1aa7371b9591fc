#pragma once
// Tensor cores of the GPU: ldmatrix and mma.sync (sm_80).

#include <cstdint>
#include <type_traits>

#include "harness/device/larger.h"
#include "harness/device/matrix.h"

namespace tp {
namespace cuda {

// Of up to four 8 x 8 matrices, each lane names one row: lane 8 i + j row j of matrix i.
template <typename T>
__device__ inline unsigned row_address(const T* tile, int stride, int row, int column) {
  return unsigned(__cvta_generic_to_shared(tile + row * stride + column));
}
__device__ inline int lane() {
  int lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// `larger` in one instruction; of a NaN, only that it is one remains.
__device__ inline float largest(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

}  // namespace cuda

template <typename T>
__device__ inline std::uint32_t round_pair(float low, float high) {
  std::uint32_t pair;
  if constexpr (std::is_same_v<T, f16>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same_v<T, bf16>);
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

template <typename T>
__device__ inline FragmentA<T> load_a(const T* tile, int stride, Where) {
  const int lane = cuda::lane();
  const unsigned row = cuda::row_address(tile, stride, lane % 16, lane / 16 * 8);
  FragmentA<T> a;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a.x[0]), "=r"(a.x[1]), "=r"(a.x[2]), "=r"(a.x[3])
               : "r"(row)
               : "memory");
  return a;
}
template <typename T>
__device__ inline FragmentB<T> load_b(const T* tile, int stride, Where) {
  const int lane = cuda::lane();  // those of lanes 16..31 are not read
  const unsigned row = cuda::row_address(tile, stride, lane % 8, lane / 8 % 2 * 8);
  FragmentB<T> b;
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(b.x[0]), "=r"(b.x[1])
               : "r"(row)
               : "memory");
  return b;
}
template <typename T>
__device__ inline FragmentB<T> load_b_transposed(const T* tile, int stride, Where) {
  const unsigned row = cuda::row_address(tile, stride, cuda::lane() % 16, 0);
  FragmentB<T> b;
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(b.x[0]), "=r"(b.x[1])
               : "r"(row)
               : "memory");
  return b;
}
template <typename T>
__device__ inline FragmentB2<T> load_b2(const T* tile, int stride, Where) {
  const int lane = cuda::lane();
  const unsigned row = cuda::row_address(tile, stride, lane % 8, lane / 8 * 8);
  FragmentB2<T> b;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(b.x[0].x[0]), "=r"(b.x[0].x[1]), "=r"(b.x[1].x[0]), "=r"(b.x[1].x[1])
               : "r"(row)
               : "memory");
  return b;
}
template <typename T>
__device__ inline FragmentB2<T> load_b2_transposed(const T* tile, int stride, Where) {
  const int lane = cuda::lane();
  const unsigned row = cuda::row_address(tile, stride, lane % 16, lane / 16 * 8);
  FragmentB2<T> b;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(b.x[0].x[0]), "=r"(b.x[0].x[1]), "=r"(b.x[1].x[0]), "=r"(b.x[1].x[1])
               : "r"(row)
               : "memory");
  return b;
}

template <typename T>
__device__ inline void mma(FragmentC& c, const FragmentA<T>& a, const FragmentB<T>& b, Where) {
  if constexpr (std::is_same_v<T, f16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]));
  } else {
    static_assert(std::is_same_v<T, bf16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]));
  }
}

template <typename T>
__device__ inline FragmentA<T> to_a(const FragmentC& left, const FragmentC& right) {
  return {{round_pair<T>(left.x[0], left.x[1]), round_pair<T>(left.x[2], left.x[3]),
           round_pair<T>(right.x[0], right.x[1]), round_pair<T>(right.x[2], right.x[3])}};
}

__device__ inline void widen_codes(std::uint32_t codes, std::uint32_t& first,
                                   std::uint32_t& second) {
#if __CUDA_ARCH__ >= 890
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "cvt.rn.f16x2.e4m3x2 %1, high;\n"
      "}"
      : "=r"(first), "=r"(second)
      : "r"(codes));
#else
  const auto wide = [codes](int i) {
    return std::uint32_t{widened<f16>(e4m3{std::uint8_t(codes >> 8 * i)}).bits};
  };
  first = wide(0) | wide(1) << 16;
  second = wide(2) | wide(3) << 16;
#endif
}

__device__ inline std::uint16_t codes_of(float first, float second) {
#if __CUDA_ARCH__ >= 890
  std::uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(second), "f"(first));
  return codes;
#else
  const auto code = [](float x) {
    return std::uint32_t{x == x ? from_float<e4m3>(x).bits : std::uint8_t{0x7F}};
  };
  return std::uint16_t(code(first) | code(second) << 8);
#endif
}

__device__ inline float quad_sum(float value, Where) {
  value += __shfl_xor_sync(0xFFFFFFFFu, value, 1);
  return value + __shfl_xor_sync(0xFFFFFFFFu, value, 2);
}
__device__ inline float quad_max(float value, Where) {
  value = cuda::largest(value, __shfl_xor_sync(0xFFFFFFFFu, value, 1));
  return cuda::largest(value, __shfl_xor_sync(0xFFFFFFFFu, value, 2));
}

}  // namespace tp
