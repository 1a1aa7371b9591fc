#include "harness/device/device.h"
#include "properties/run/faulty_testing.h"

namespace tp {

namespace {

__global__ void faulty_kernel(View<float> x, View<float> out, Mistake mistake) {
  const std::int64_t row = blockIdx.x;
  const float* in = x.data + row * x.row_stride;
  float* to = out.data + row * out.row_stride;
  for (std::int64_t j = threadIdx.x; j < x.cols; j += blockDim.x) {
    if (mistake == Mistake::skips_last_column && j == x.cols - 1) continue;
    to[j] = mistake == Mistake::drifts ? in[j] * (1.0f + float(row) * 0x1p-12f) : in[j];
  }
  if (row != 0 || threadIdx.x != 0) return;
  if (mistake == Mistake::writes_input) x.data[1] += 1.0f;
  if (mistake == Mistake::writes_padding) to[x.cols] = 1.0f;
  if (mistake == Mistake::overruns) out.data[out.rows * out.row_stride] = 1.0f;
  if (mistake == Mistake::underruns) out.data[-1] = 1.0f;
  if (mistake == Mistake::not_a_number) to[0] = sqrtf(-1.0f - fabsf(in[0]));
  if (mistake == Mistake::wrong_value) to[0] = -in[0];
}

}  // namespace

void faulty_copy(View<float> x, View<float> out, Mistake mistake, Stream& stream) {
  // One thread a row: what it writes last is what counts.
  launch("faulty_copy", faulty_kernel, dim3(unsigned(x.rows)), dim3(1), 0, stream, x, out, mistake);
}

}  // namespace tp
