#include <cmath>
#include <cstdint>

#include "harness/device/device.h"
#include "harness/device/require.h"
#include "kernels/attention_block.h"

namespace tp {

namespace {

// One block a row.
template <typename T>
__global__ void output_gate_kernel(View<const T> x, View<const T> gate, View<T> out) {
  const std::int64_t row = blockIdx.x;
  for (std::int64_t j = threadIdx.x; j < x.cols; j += blockDim.x) {
    const float g = to_float(gate.data[row * gate.row_stride + j]);
    // expf of a large number is infinity, and the gate then exactly closed.
    const float sigmoid = 1.0f / (1.0f + expf(-g));
    out.data[row * out.row_stride + j] =
        from_float<T>(to_float(x.data[row * x.row_stride + j]) * sigmoid);
  }
}

}  // namespace

template <typename T>
void output_gate(View<const T> x, View<const T> gate, View<T> out, Stream& stream) {
  require(gate.rows == x.rows && gate.cols == x.cols && out.rows == x.rows && out.cols == x.cols,
          "output_gate", "x is {} x {}, the gate {} x {}, the output {} x {}",
          {x.rows, x.cols, gate.rows, gate.cols, out.rows, out.cols});
  require(x.row_stride >= x.cols && gate.row_stride >= gate.cols && out.row_stride >= out.cols,
          "output_gate", "rows of {} columns are {}, {} and {} apart",
          {x.cols, x.row_stride, gate.row_stride, out.row_stride});
  const unsigned threads = x.cols <= 32 ? 32 : x.cols <= 512 ? 128 : 256;
  launch("output_gate", output_gate_kernel<T>, dim3(unsigned(x.rows)), dim3(threads), 0, stream, x,
         gate, out);
}

template void output_gate(View<const float>, View<const float>, View<float>, Stream&);
template void output_gate(View<const f16>, View<const f16>, View<f16>, Stream&);
template void output_gate(View<const bf16>, View<const bf16>, View<bf16>, Stream&);

}  // namespace tp
