#include <algorithm>
#include <cmath>
#include <cstdint>

#include "harness/device/device.h"
#include "harness/device/matmul.h"
#include "harness/device/require.h"
#include "kernels/merged_linear.h"
#include "kernels/reduce.cuh"

namespace tp {

namespace {

// One block a row.
template <typename T>
__global__ void silu_and_mul_kernel(View<const T> gate, View<const T> up, View<T> out) {
  const std::int64_t row = blockIdx.x;
  for (std::int64_t j = threadIdx.x; j < out.cols; j += blockDim.x) {
    const float g = to_float(gate.data[row * gate.row_stride + j]);
    // expf of a large number is infinity, and the gate then exactly closed.
    const float silu = g / (1.0f + expf(-g));
    out.data[row * out.row_stride + j] =
        from_float<T>(silu * to_float(up.data[row * up.row_stride + j]));
  }
}

}  // namespace

template <typename T>
void merged_linear(View<const T> x, View<const T> weight, View<const T> bias, View<T> gate_up,
                   Stream& stream) {
  require(weight.rows == gate_up.cols, "merged_linear",
          "the weight has {} rows, gate and up {} columns", {weight.rows, gate_up.cols});
  require(bias.rows == 0 || bias.cols == weight.rows, "merged_linear",
          "the bias has {} elements, the weight {} rows", {bias.cols, weight.rows});
  matmul<T>(x, weight, bias.rows == 0 ? nullptr : bias.data, gate_up, stream);
}

template <typename T>
void silu_and_mul(View<const T> gate_up, View<T> out, const ShardingRules& rules, Stream& stream) {
  require(gate_up.cols % 2 == 0, "silu_and_mul", "{} columns have no halves", {gate_up.cols});
  const GatedHalves at = rules.gated.halves(gate_up.cols);
  require(out.rows == gate_up.rows && std::max(at.gate, at.up) + out.cols <= gate_up.cols,
          "silu_and_mul", "gate_up is {} x {}, out is {} x {}",
          {gate_up.rows, gate_up.cols, out.rows, out.cols});
  launch("silu_and_mul", silu_and_mul_kernel<T>, dim3(unsigned(out.rows)),
         dim3(unsigned(row_threads(out.cols))), 0, stream, gate_up.columns(at.gate, out.cols),
         gate_up.columns(at.up, out.cols), out);
}

template void merged_linear(View<const float>, View<const float>, View<const float>, View<float>,
                            Stream&);
template void merged_linear(View<const f16>, View<const f16>, View<const f16>, View<f16>, Stream&);
template void merged_linear(View<const bf16>, View<const bf16>, View<const bf16>, View<bf16>,
                            Stream&);
template void silu_and_mul(View<const float>, View<float>, const ShardingRules&, Stream&);
template void silu_and_mul(View<const f16>, View<f16>, const ShardingRules&, Stream&);
template void silu_and_mul(View<const bf16>, View<bf16>, const ShardingRules&, Stream&);

}  // namespace tp
