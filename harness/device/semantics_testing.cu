#include "harness/device/device.h"
namespace tp {
__global__ void rms(const float* x, float* out, int n) {
  float* scratch = dynamic_shared<float>();
  float s = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) { float v = x[blockIdx.x * n + i]; s = fmaf(v, v, s); }
  s = block_sum(s, scratch);
  float r = 1.0f / sqrtf(s / n + 1e-6f);
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[blockIdx.x * n + i] = x[blockIdx.x * n + i] * r;
}
__global__ void scale(const float* x, float* out, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = x[i] * 2.0f;
}
void go(Stream& s, float* x, float* o, int blocks, int threads, int n, int which) {
  if (which == 0) launch("rms", rms, blocks, threads, block_scratch_floats(threads) * 4, s, x, o, n);
  else launch("scale", scale, blocks, threads, 0, s, x, o, blocks * threads);
}
}
