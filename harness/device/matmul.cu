#include <type_traits>

#include "harness/device/matmul.h"
#include "harness/device/require.h"
#include "harness/device/streamed_product.cuh"
#include "harness/device/tiled_product.cuh"

namespace tp {

namespace {

// f32: a block makes kFloatRows x kFloatCols elements of out, a thread 4 x 4 of them, apart by as
// many rows and columns as the block has threads in that direction.
constexpr int kFloatRows = 32, kFloatCols = 64, kFloatDepth = 32;
constexpr int kThreadsDown = kFloatRows / 4, kThreadsAcross = kFloatCols / 4;
constexpr int kFloatThreads = kThreadsDown * kThreadsAcross;
constexpr int kFloatStride = kFloatDepth + 1;  // rows of a tile begin at different banks

// Rows [first, first + rows) and columns [k, k + kFloatDepth) of `from`; rows beyond its end are
// zeros, columns beyond it are left as they are.
__device__ void load_float_tile(const View<const float>& from, std::int64_t first, int rows,
                                std::int64_t k, float* tile) {
  for (int i = int(threadIdx.x); i < rows * kFloatDepth; i += kFloatThreads) {
    const std::int64_t row = first + i / kFloatDepth, col = k + i % kFloatDepth;
    if (col >= from.cols) continue;
    tile[i / kFloatDepth * kFloatStride + i % kFloatDepth] =
        row < from.rows ? from.data[row * from.row_stride + col] : 0.0f;
  }
}

using FloatProduct = Product<View<const float>, View<const float>, Unscaled, float, float>;

__global__ void float_kernel(FloatProduct p) {
  float* x_tile = dynamic_shared<float>();
  float* w_tile = x_tile + kFloatRows * kFloatStride;
  const auto [first_row, first_col] = corner_of_block(p.out, kFloatRows, kFloatCols);
  const int down = int(threadIdx.x) / kThreadsAcross, across = int(threadIdx.x) % kThreadsAcross;
  float sums[4][4] = {};
  for (std::int64_t k = 0; k < p.x.cols; k += kFloatDepth) {
    load_float_tile(p.x, first_row, kFloatRows, k, x_tile);
    load_float_tile(p.w, first_col, kFloatCols, k, w_tile);
    __syncthreads();
    const int depth = p.x.cols - k < kFloatDepth ? int(p.x.cols - k) : kFloatDepth;
    if (first_row + down < p.x.rows && first_col + across < p.w.rows) {
      for (int kk = 0; kk < depth; ++kk) {
        float w[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
          w[j] = w_tile[(across + j * kThreadsAcross) * kFloatStride + kk];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (first_row + down + i * kThreadsDown >= p.x.rows) break;
          const float x = x_tile[(down + i * kThreadsDown) * kFloatStride + kk];
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[i][j] = fmaf(x, w[j], sums[i][j]);
        }
      }
    }
    __syncthreads();  // nobody still reads what the next step overwrites
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const std::int64_t row = first_row + down + i * kThreadsDown,
                         col = first_col + across + j * kThreadsAcross;
      if (row < p.out.rows && col < p.out.cols) finish(p.bias, p.out, row, col, sums[i][j]);
    }
  }
}

void launch_float(const FloatProduct& p, Stream& stream) {
  launch("matmul", float_kernel, blocks_of(p.out, kFloatRows, kFloatCols), dim3(kFloatThreads),
         (kFloatRows + kFloatCols) * kFloatStride * sizeof(float), stream, p);
}

}  // namespace

template <typename T, typename Out>
void matmul(View<const T> x, View<const T> w, const T* bias, View<Out> out, Stream& stream) {
  require(x.cols == w.cols && out.rows == x.rows && out.cols == w.rows, "matmul",
          "x is {} x {}, w is {} x {}, out is {} x {}",
          {x.rows, x.cols, w.rows, w.cols, out.rows, out.cols});
  if constexpr (std::is_same_v<T, float>) {
    launch_float({x, w, {}, x.cols, bias, out}, stream);
  } else {
    if (launch_untiled<T>("matmul",
                          {.x = x,
                           .w = w,
                           .bias = bias,
                           .bias_type = dtype_of<T>::value,
                           .out = out.data,
                           .out_type = dtype_of<Out>::value,
                           .out_stride = out.row_stride},
                          false, stream)) {
      return;
    }
    launch_tiled<T>("matmul",
                    Product<Plain<T>, Plain<T>, Unscaled, T, Out>{
                        Plain<T>(x), Plain<T>(w), {}, x.cols, bias, out},
                    stream);
  }
}

Accumulation matmul_accumulation(DType t, std::int64_t k) {
  if (t == DType::f32) return {.depth = k};
  // Streamed, a product passes a quarter of these steps, and three additions.
  return {.depth = (k + kStep - 1) / kStep,
          .matrix_steps = true,
          .least_normal = t == DType::f16 ? 0x1p-14 : 0x1p-126};
}

template void matmul(View<const float>, View<const float>, const float*, View<float>, Stream&);
template void matmul(View<const f16>, View<const f16>, const f16*, View<f16>, Stream&);
template void matmul(View<const f16>, View<const f16>, const f16*, View<float>, Stream&);
template void matmul(View<const bf16>, View<const bf16>, const bf16*, View<bf16>, Stream&);
template void matmul(View<const bf16>, View<const bf16>, const bf16*, View<float>, Stream&);

}  // namespace tp
