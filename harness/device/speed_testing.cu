#include "harness/device/device.h"
#include "harness/device/speed_testing.h"

namespace tp::testing {
namespace {

__global__ void rms_norm_like_kernel(const float* x, float* out, int cols) {
  const float* row = x + std::int64_t(blockIdx.x) * cols;
  float sum = 0.0f;
  for (int i = int(threadIdx.x); i < cols; i += int(blockDim.x)) sum = fmaf(row[i], row[i], sum);
  const float mean = block_sum(sum, dynamic_shared<float>()) / float(cols);
  const float scale = 1.0f / sqrtf(mean + 1e-6f);
  float* to = out + std::int64_t(blockIdx.x) * cols;
  for (int i = int(threadIdx.x); i < cols; i += int(blockDim.x)) to[i] = row[i] * scale;
}
__global__ void elementwise_kernel(const float* x, float* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = x[i] * 2.0f;
}

}  // namespace

void rms_norm_like(Stream& stream, const float* x, float* out, int rows, int cols, int threads) {
  launch("rms_norm_like", rms_norm_like_kernel, rows, threads,
         block_scratch_floats(threads) * sizeof(float), stream, x, out, cols);
}
void elementwise(Stream& stream, const float* x, float* out, int blocks, int threads) {
  launch("elementwise", elementwise_kernel, blocks, threads, 0, stream, x, out);
}

}  // namespace tp::testing
