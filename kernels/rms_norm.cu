#include "harness/device/device.h"
#include "harness/device/require.h"
#include "kernels/reduce.cuh"
#include "kernels/rms_norm.h"

namespace tp {

namespace {

// A row that is there.
template <typename T>
struct PlainRow {
  const T* x;

  __device__ float operator[](std::int64_t j) const { return to_float(x[j]); }
};

// The sum of two rows, kept in Sum.
template <typename T, typename Sum>
struct AddedRow {
  const T* x;
  const T* residual;

  __device__ float operator[](std::int64_t j) const {
    return to_float(from_float<Sum>(to_float(x[j]) + to_float(residual[j])));
  }
};

// One block a row. x * inverse is kept in Normed until the weight is multiplied.
template <typename T, typename Normed, typename Row>
__device__ void norm_row(const Row& x, const T* weight, T* out, std::int64_t cols, float eps) {
  float sum = 0.0f;
  for (std::int64_t j = threadIdx.x; j < cols; j += blockDim.x) sum = fmaf(x[j], x[j], sum);
  const float inverse = inverse_root(block_sum(sum, dynamic_shared<float>()) / float(cols), eps);
  for (std::int64_t j = threadIdx.x; j < cols; j += blockDim.x) {
    const float normed = to_float(from_float<Normed>(x[j] * inverse));
    out[j] = from_float<T>(normed * to_float(weight[j]));
  }
}

template <typename T, typename Normed>
__global__ void rms_norm_kernel(View<const T> x, const T* weight, View<T> out, float eps) {
  const std::int64_t row = blockIdx.x;
  norm_row<T, Normed>(PlainRow<T>{x.data + row * x.row_stride}, weight,
                      out.data + row * out.row_stride, x.cols, eps);
}

template <typename T, typename Sum, typename Normed>
__global__ void add_rms_norm_kernel(View<const T> x, View<const T> residual, const T* weight,
                                    View<T> residual_out, View<T> out, float eps) {
  const std::int64_t row = blockIdx.x;
  // Added again in every loop: both rows are in the cache by then, and the sum is the same.
  const AddedRow<T, Sum> sum{x.data + row * x.row_stride,
                             residual.data + row * residual.row_stride};
  T* written = residual_out.data + row * residual_out.row_stride;
  for (std::int64_t j = threadIdx.x; j < x.cols; j += blockDim.x)
    written[j] = from_float<T>(sum[j]);
  norm_row<T, Normed>(sum, weight, out.data + row * out.row_stride, x.cols, eps);
}

// Calls f with a T where `rounded` and with a float where not: the type that a value is kept in.
template <typename T, typename F>
void kept_in(bool rounded, F f) {
  rounded ? f(T{}) : f(float{});
}

}  // namespace

template <typename T>
void rms_norm(View<const T> x, View<const T> weight, View<T> out, float eps,
              const NormRounding& rounding, Stream& stream) {
  require(weight.cols == x.cols && out.cols == x.cols && out.rows == x.rows, "rms_norm",
          "x is {} x {}, weight has {} columns, out is {} x {}",
          {x.rows, x.cols, weight.cols, out.rows, out.cols});
  const int threads = row_threads(x.cols);
  kept_in<T>(rounding.before_weight, [&]<typename Normed>(Normed) {
    launch("rms_norm", rms_norm_kernel<T, Normed>, dim3(unsigned(x.rows)), dim3(unsigned(threads)),
           block_scratch_floats(threads) * sizeof(float), stream, x, weight.data, out, eps);
  });
}

template <typename T>
void add_rms_norm(View<const T> x, View<const T> residual, View<const T> weight,
                  View<T> residual_out, View<T> out, float eps, const NormRounding& rounding,
                  Stream& stream) {
  require(weight.cols == x.cols && out.cols == x.cols && out.rows == x.rows, "add_rms_norm",
          "x is {} x {}, weight has {} columns, out is {} x {}",
          {x.rows, x.cols, weight.cols, out.rows, out.cols});
  require(residual.rows == x.rows && residual.cols == x.cols && residual_out.rows == x.rows &&
              residual_out.cols == x.cols,
          "add_rms_norm", "x is {} x {}, residual is {} x {}, residual_out is {} x {}",
          {x.rows, x.cols, residual.rows, residual.cols, residual_out.rows, residual_out.cols});
  const int threads = row_threads(x.cols);
  kept_in<T>(rounding.sum, [&]<typename Sum>(Sum) {
    kept_in<T>(rounding.before_weight, [&]<typename Normed>(Normed) {
      launch("add_rms_norm", add_rms_norm_kernel<T, Sum, Normed>, dim3(unsigned(x.rows)),
             dim3(unsigned(threads)), block_scratch_floats(threads) * sizeof(float), stream, x,
             residual, weight.data, residual_out, out, eps);
    });
  });
}

Profile rms_norm_profile(std::int64_t cols) {
  return {.depth = row_sum_depth(cols, row_threads(cols)),
          .all_reduce_terms = 1,
          .terms = cols,
          .rsqrt_ulps = 1};
}

template void rms_norm(View<const float>, View<const float>, View<float>, float,
                       const NormRounding&, Stream&);
template void rms_norm(View<const f16>, View<const f16>, View<f16>, float, const NormRounding&,
                       Stream&);
template void rms_norm(View<const bf16>, View<const bf16>, View<bf16>, float, const NormRounding&,
                       Stream&);
template void add_rms_norm(View<const float>, View<const float>, View<const float>, View<float>,
                           View<float>, float, const NormRounding&, Stream&);
template void add_rms_norm(View<const f16>, View<const f16>, View<const f16>, View<f16>, View<f16>,
                           float, const NormRounding&, Stream&);
template void add_rms_norm(View<const bf16>, View<const bf16>, View<const bf16>, View<bf16>,
                           View<bf16>, float, const NormRounding&, Stream&);

}  // namespace tp
