#pragma once
// Products of small matrices on tensor cores, a warp at a time. Included by device.h through its
// dialects, which define what is declared here.
//
// A warp computes C (16 x 8) += A (16 x 16) * B (16 x 8): A and B of T (f16 or bf16), C in fp32.
// All 32 lanes call each of these functions together, with the same tile. Tiles are in shared
// memory, and every row of one begins at a multiple of 16 bytes: so do `tile`, and `stride`
// elements. (Rows that are 16 bytes more than a multiple of 128 apart meet no bank conflicts.)

#include <cstdint>

#include "harness/base/dtype.h"

namespace tp {

// One lane's parts of the operands of mma.sync.m16n8k16. With g = lane / 4 and t = lane % 4:
template <typename T>
struct FragmentA {  // x[i]: row g + 8 * (i % 2), k = 2 t + 8 * (i / 2) and the next
  std::uint32_t x[4];
};
template <typename T>
struct FragmentB {  // x[i]: column g, k = 2 t + 8 i and the next
  std::uint32_t x[2];
};
template <typename T>
struct FragmentB2 {  // two operands that one instruction loads
  FragmentB<T> x[2];
};
struct FragmentC {  // x[i]: row g + 8 * (i / 2), column 2 t + i % 2
  float x[4];
};

// A[i][k] = tile[i * stride + k].
template <typename T>
__device__ FragmentA<T> load_a(const T* tile, int stride, Where where = Where::here());
// B[k][n] = tile[n * stride + k]: the rows of an [n, k] matrix (weights, keys).
template <typename T>
__device__ FragmentB<T> load_b(const T* tile, int stride, Where where = Where::here());
// B[k][n] = tile[k * stride + n] (values).
template <typename T>
__device__ FragmentB<T> load_b_transposed(const T* tile, int stride, Where where = Where::here());
// load_b of k = 0..15 and of k = 16..31, for the same 8 columns; a row is 32 elements.
template <typename T>
__device__ FragmentB2<T> load_b2(const T* tile, int stride, Where where = Where::here());
// load_b_transposed of columns 0..7 and of columns 8..15, for the same 16 k.
template <typename T>
__device__ FragmentB2<T> load_b2_transposed(const T* tile, int stride, Where where = Where::here());

// c += a * b. The products are exact; how they are added up is the tensor core's own, and what the
// emulator does is the published model of an H100, bit for bit: with u the largest exponent among
// the 16 products and c, what lies below 2^(u - 25) is cut off each of them, and their sum is
// rounded toward zero to fp32. A product's exponent is the sum of its operands', and a subnormal
// operand has the exponent of the smallest normal one. This is TC(16, 25) of
// research/numerics.md section 4, as long as no operand is subnormal: beside subnormal operands
// more is cut off.
template <typename T>
__device__ void mma(FragmentC& c, const FragmentA<T>& a, const FragmentB<T>& b,
                    Where where = Where::here());

// Two accumulators side by side (columns 0..7 and 8..15), each value rounded to T as from_float
// does, as the A operand of the next product.
template <typename T>
__device__ FragmentA<T> to_a(const FragmentC& left, const FragmentC& right);

// Four values of e4m3, the first in the lowest bits, as two pairs of f16: exactly.
__device__ void widen_codes(std::uint32_t codes, std::uint32_t& first, std::uint32_t& second);

// Two floats as from_float<e4m3> rounds them, the first in the low byte; but any NaN is 0x7F.
__device__ std::uint16_t codes_of(float first, float second);

// Over the 4 lanes that hold a row of C: v += __shfl_xor_sync(~0u, v, o) for o = 1, 2; and the same
// with `larger`: NaN if any lane's value is.
__device__ float quad_sum(float value, Where where = Where::here());
__device__ float quad_max(float value, Where where = Where::here());

}  // namespace tp
