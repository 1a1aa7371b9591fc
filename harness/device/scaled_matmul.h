#pragma once
// The matrix product of quantised linear layers: codes are multiplied on tensor cores, and what a
// block of columns gave is scaled in fp32. The tiles and the loop are matmul's.

#include <cstdint>

#include "harness/base/compare.h"
#include "harness/base/dtype.h"
#include "harness/base/tensor.h"
#include "harness/device/stream.h"

namespace tp {

// What the codes of a matrix are multiplied with, in device memory: the element in row i and column
// k has data[i * row_stride + (k + first_col) / cols_per]. So there is one scale for the tensor
// ({data}), one for each row ({data, 1}), or one for each block of columns of a row, which need not
// begin at the first column that is here (first_col: columns of its first block that are not).
struct Scales {
  const float* data = nullptr;  // nullptr: the codes are the values
  std::int64_t row_stride = 0;  // 0: all rows have the same
  std::int64_t cols_per = 0;    // 0: all columns have the same
  std::int64_t first_col = 0;
};

// Two e2m1 a byte, the low half first, and an e4m3 scale for every 16 columns of a row: element
// (j, k) is the code of column k times scales[j][(k + first_col) / 16], exact in f16 and bf16. The
// scale of the tensor is one of Scales.
struct Nvfp4Weight {
  static constexpr std::int64_t kGroupCols = 16;

  View<const std::uint8_t> codes;  // [rows, at least ceil(cols / 2)]
  View<const e4m3> scales;         // [rows, at least ceil((first_col + cols) / 16)]
  std::int64_t cols = 0;
  std::int64_t first_col = 0;
};

// Eight 4-bit numbers an i32, the lowest bits first, along a row (checkpoints have [cols / 8,
// rows]: transposed): element (j, k) is (q - 8) * scales[g][j], rounded once to the type of the
// activations, where g is groups[k], or (k + first_col) / group_cols where groups is nullptr.
struct GptqWeight {
  View<const std::int32_t> codes;        // [rows, at least ceil(cols / 8)]
  View<const f16> scales;                // [groups, rows]
  const std::int32_t* groups = nullptr;  // cols elements in device memory, each a row of scales
  std::int64_t group_cols = 0;           // where groups is nullptr
  std::int64_t cols = 0;
  std::int64_t first_col = 0;
};

// out[i][j] = bias[j] + sum over blocks b of columns (x_scale[i][b] * w_scale[j][b]) *
//             sum over k in b of x[i][k] * w[j][k]
// A block ends where a scale of x or of w does. Its sum is added up in fp32, in ascending k, the
// two scales are multiplied in fp32, and total = fmaf(sum of the block, their product, total), in
// ascending b; then the bias is added in fp32, and there is one rounding to Out.
// Where no scale changes along a row, x and w are codes and the rows have enough columns
// (streamed_size.h), the columns may be added up in another order; and where they have one scale
// each, cuBLASLt may do it, if there is one (library_product.h).
// x [m, k], w [n, k], out [m, n]: any sizes from 1 on, any row strides, any alignment of the
// elements. bias: n elements, or nullptr. out must overlap nothing.
// An element's bits depend on its row of x, its row of w, their scales and its bias alone, and on
// who makes the product, as matmul's.
// `overlaps`: it may begin before the kernel before it in the stream has ended, which makes no part
// of w or its scales (overlap.h).
// Throws Fault(BadLaunch) where the sizes do not fit each other.
//   X e4m3 (activations that were quantised): Weight View<const e4m3>; T f32, f16 or bf16
//   X = T, f16 or bf16 (those that were not): Weight View<const e4m3>, Nvfp4Weight or GptqWeight;
//   f32 is refused with a Fault, too
//   Out T or float
template <typename X, typename Weight, typename T, typename Out>
void scaled_matmul(View<const X> x, const Scales& x_scales, const Weight& w, const Scales& w_scales,
                   const T* bias, View<Out> out, Stream& stream, bool overlaps = false);

// How scaled_matmul adds up the k products of a block; x: the type of the activations (X).
Accumulation scaled_accumulation(DType x, std::int64_t k);
// The same of codes times codes with one scale each, `rows` of x.
Accumulation tensor_scaled_accumulation(std::int64_t rows, std::int64_t k);

}  // namespace tp
