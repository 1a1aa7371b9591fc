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
__global__ void products_kernel(const bf16* x, float* out, int count, bool loads) {
  bf16* tile = dynamic_shared<bf16>();
  for (int i = int(threadIdx.x); i < 24 * 16; i += int(blockDim.x)) tile[i] = x[i];
  __syncthreads();
  FragmentA<bf16> a = load_a(tile, 16);
  FragmentB<bf16> b = load_b(tile + 16 * 16, 16);
  FragmentC c{};
  for (int i = 0; i < count; ++i) {
    if (loads) {
      a = load_a(tile, 16);
      b = load_b(tile + 16 * 16, 16);
    }
    mma(c, a, b);
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = c.x[0] + c.x[1] + c.x[2] + c.x[3];
}
__global__ void copies_kernel(const float* x, float* out, int count) {
  float* mine = dynamic_shared<float>() + threadIdx.x * 16;
  float sum = 0.0f;
  for (int i = 0; i < count; i += 4) {
    for (int j = 0; j < 4; ++j) copy_async<16>(mine + 4 * j, x + threadIdx.x * 4);
    copy_async_commit();
    copy_async_wait<0>();
    sum += mine[5];
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
__global__ void quad_sums_kernel(const float* x, float* out, int count) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  float sum = x[i];
  for (int k = 0; k < count; ++k) sum = quad_sum(sum) * 0.25f;
  out[i] = sum;
}

}  // namespace

void rms_norm_like(Stream& stream, const float* x, float* out, int rows, int cols, int threads) {
  launch("rms_norm_like", rms_norm_like_kernel, rows, threads,
         block_scratch_floats(threads) * sizeof(float), stream, x, out, cols);
}
void elementwise(Stream& stream, const float* x, float* out, int blocks, int threads) {
  launch("elementwise", elementwise_kernel, blocks, threads, 0, stream, x, out);
}

void products(Stream& stream, const bf16* x, float* out, int blocks, int threads, int count,
              bool loads) {
  launch("products", products_kernel, blocks, threads, 24 * 16 * sizeof(bf16), stream, x, out,
         count, loads);
}
void copies(Stream& stream, const float* x, float* out, int blocks, int threads, int count) {
  launch("copies", copies_kernel, blocks, threads, threads * 64, stream, x, out, count);
}
void quad_sums(Stream& stream, const float* x, float* out, int blocks, int threads, int count) {
  launch("quad_sums", quad_sums_kernel, blocks, threads, 0, stream, x, out, count);
}

}  // namespace tp::testing
