#include "harness/device/device.h"
#include "harness/device/require.h"
#include "kernels/reduce.cuh"
#include "kernels/rms_norm.h"

namespace tp {

namespace {

// One block a row.
template <typename T>
__global__ void rms_norm_kernel(View<const T> x, const T* weight, View<T> out, float eps) {
  float* scratch = dynamic_shared<float>();
  const std::int64_t row = blockIdx.x;
  const T* in = x.data + row * x.row_stride;
  const float sum = row_sum_of_squares(in, x.cols, scratch);
  // Both operations round to nearest, on a GPU as on the host: rsqrtf would not give the same bits.
  const float inverse = 1.0f / sqrtf(sum / float(x.cols) + eps);
  scale_row(in, weight, out.data + row * out.row_stride, x.cols, inverse);
}

}  // namespace

template <typename T>
void rms_norm(View<const T> x, View<const T> weight, View<T> out, float eps, Stream& stream) {
  require(weight.cols == x.cols && out.cols == x.cols && out.rows == x.rows, "rms_norm",
          "x is {} x {}, weight has {} columns, out is {} x {}",
          {x.rows, x.cols, weight.cols, out.rows, out.cols});
  const int threads = row_threads(x.cols);
  launch("rms_norm", rms_norm_kernel<T>, dim3(unsigned(x.rows)), dim3(unsigned(threads)),
         block_scratch_floats(threads) * sizeof(float), stream, x, weight.data, out, eps);
}

Profile rms_norm_profile(std::int64_t cols) {
  return {.depth = row_sum_depth(cols, row_threads(cols)),
          .all_reduce_terms = 1,
          .terms = cols,
          .rsqrt_ulps = 1};
}

template void rms_norm(View<const float>, View<const float>, View<float>, float, Stream&);
template void rms_norm(View<const f16>, View<const f16>, View<f16>, float, Stream&);
template void rms_norm(View<const bf16>, View<const bf16>, View<bf16>, float, Stream&);

}  // namespace tp
