#include "harness/device/device.h"
#include "harness/device/require.h"
#include "kernels/quantise.h"
#include "kernels/quantised_linear.h"
#include "kernels/reduce.cuh"

namespace tp {

namespace {

constexpr int kThreads = 256;

__global__ void expand_slots_kernel(const float* slots, const std::int32_t* slot_of_row,
                                    View<float> factors) {
  const std::int64_t row = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= factors.rows) return;
  factors.data[row * factors.row_stride] = slots[slot_of_row[row]];
}

__global__ void repeat_kernel(View<float> factors) {
  const std::int64_t row = 1 + std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row < factors.rows) factors.data[row * factors.row_stride] = factors.data[0];
}

constexpr int kTile = 16;

// A block transposes a tile, so that it reads rows and writes rows.
__global__ void transpose_kernel(View<const std::int32_t> from, View<std::int32_t> to) {
  std::int32_t* tile = dynamic_shared<std::int32_t>();
  const std::int64_t across = (from.cols + kTile - 1) / kTile;
  const std::int64_t first_row = blockIdx.x / across * kTile,
                     first_col = blockIdx.x % across * kTile;
  const int slow = int(threadIdx.x) / kTile, fast = int(threadIdx.x) % kTile;
  if (first_row + slow < from.rows && first_col + fast < from.cols) {
    tile[slow * (kTile + 1) + fast] =
        from.data[(first_row + slow) * from.row_stride + first_col + fast];
  }
  __syncthreads();
  if (first_col + slow < to.rows && first_row + fast < to.cols) {
    to.data[(first_col + slow) * to.row_stride + first_row + fast] =
        tile[fast * (kTile + 1) + slow];
  }
}

dim3 blocks_for(std::int64_t elements) {
  return dim3(unsigned((elements + kThreads - 1) / kThreads));
}

Scales scales_of(const QuantisedWeight& w) {
  const bool blocks = w.format.scheme == Scheme::fp8_block;
  return {.data = w.factors.data,
          .row_stride = w.format.scheme == Scheme::fp8_tensor ? 0 : w.factors.row_stride,
          .cols_per = blocks ? w.format.block_cols : 0,
          .first_col = blocks ? w.first_col : 0};
}

// Calls product(weight, its scales) with the weight in the form that scaled_matmul knows.
template <typename F>
void with_plain_activations(const QuantisedWeight& w, F product) {
  switch (w.format.scheme) {
    case Scheme::nvfp4:
      return product(Nvfp4Weight{w.packed, w.group_scales, w.cols, w.first_col}, scales_of(w));
    case Scheme::gptq:
      return product(GptqWeight{.codes = w.words,
                                .scales = w.table,
                                .groups = w.groups,
                                .group_cols = w.format.block_cols,
                                .cols = w.cols},
                     Scales{});
    default:
      return product(w.codes, scales_of(w));
  }
}

}  // namespace

void global_factors(View<const float> slots, const std::int32_t* slot_of_row, View<float> factors,
                    const ShardingRules& rules, Stream& stream) {
  require(factors.cols == 1 && slots.rows == 1, "quantised_linear",
          "{} x {} factors are made of {} x {} slots",
          {factors.rows, factors.cols, slots.rows, slots.cols});
  if (rules.quant.own_global_scale) {
    launch("expand_slots", expand_slots_kernel, blocks_for(factors.rows), dim3(kThreads), 0, stream,
           slots.data, slot_of_row, factors);
    return;
  }
  reduce_slots(slots.data, slots.cols, rules.quant.global_scale, factors.data, stream);
  launch("repeat", repeat_kernel, blocks_for(factors.rows), dim3(kThreads), 0, stream, factors);
}

void transpose_words(View<const std::int32_t> columns, View<std::int32_t> rows, Stream& stream) {
  require(columns.rows == rows.cols && columns.cols == rows.rows, "quantised_linear",
          "{} x {} words become {} x {}", {columns.rows, columns.cols, rows.rows, rows.cols});
  const std::int64_t tiles =
      (columns.rows + kTile - 1) / kTile * ((columns.cols + kTile - 1) / kTile);
  launch("transpose", transpose_kernel, dim3(unsigned(tiles)), dim3(kTile * kTile),
         kTile * (kTile + 1) * sizeof(std::int32_t), stream, columns, rows);
}

template <typename T, typename Out>
void quantised_product(View<const T> x, const QuantisedWeight& weight, View<const T> bias,
                       View<Out> out, Stream& stream) {
  require(bias.rows == 0 || bias.cols == out.cols, "quantised_linear",
          "the bias has {} elements, the output {} columns", {bias.cols, out.cols});
  with_plain_activations(weight, [&]<typename Weight>(const Weight& w, const Scales& scales) {
    scaled_matmul<T, Weight, T, Out>(x, {}, w, scales, bias.rows == 0 ? nullptr : bias.data, out,
                                     stream);
  });
}

template <typename T, typename Out>
void quantised_product(View<const e4m3> x, const Scales& x_scales, const QuantisedWeight& weight,
                       View<const T> bias, View<Out> out, Stream& stream) {
  require(bias.rows == 0 || bias.cols == out.cols, "quantised_linear",
          "the bias has {} elements, the output {} columns", {bias.cols, out.cols});
  scaled_matmul<e4m3, View<const e4m3>, T, Out>(x, x_scales, weight.codes, scales_of(weight),
                                                bias.rows == 0 ? nullptr : bias.data, out, stream);
}

template <typename T, typename Out>
void quantised_linear(View<const T> x, const float* x_scale, const QuantisedWeight& weight,
                      View<const T> bias, View<e4m3> codes, View<Out> out, Stream& stream) {
  require(weight.format.scheme == Scheme::fp8_tensor && (bias.rows == 0 || bias.cols == out.cols),
          "quantised_linear", "scheme {}, the bias has {} elements, the output {} columns",
          {std::int64_t(weight.format.scheme), bias.cols, out.cols});
  quantise_fixed(x, x_scale, codes, stream, true);
  scaled_matmul<e4m3, View<const e4m3>, T, Out>(
      codes, Scales{.data = x_scale}, weight.codes, scales_of(weight),
      bias.rows == 0 ? nullptr : bias.data, out, stream, true);
}

template void quantised_linear(View<const float>, const float*, const QuantisedWeight&,
                               View<const float>, View<e4m3>, View<float>, Stream&);
template void quantised_linear(View<const f16>, const float*, const QuantisedWeight&,
                               View<const f16>, View<e4m3>, View<f16>, Stream&);
template void quantised_linear(View<const bf16>, const float*, const QuantisedWeight&,
                               View<const bf16>, View<e4m3>, View<bf16>, Stream&);
template void quantised_product(View<const f16>, const QuantisedWeight&, View<const f16>, View<f16>,
                                Stream&);
template void quantised_product(View<const f16>, const QuantisedWeight&, View<const f16>,
                                View<float>, Stream&);
template void quantised_product(View<const bf16>, const QuantisedWeight&, View<const bf16>,
                                View<bf16>, Stream&);
template void quantised_product(View<const bf16>, const QuantisedWeight&, View<const bf16>,
                                View<float>, Stream&);
template void quantised_product(View<const e4m3>, const Scales&, const QuantisedWeight&,
                                View<const float>, View<float>, Stream&);
template void quantised_product(View<const e4m3>, const Scales&, const QuantisedWeight&,
                                View<const f16>, View<f16>, Stream&);
template void quantised_product(View<const e4m3>, const Scales&, const QuantisedWeight&,
                                View<const f16>, View<float>, Stream&);
template void quantised_product(View<const e4m3>, const Scales&, const QuantisedWeight&,
                                View<const bf16>, View<bf16>, Stream&);
template void quantised_product(View<const e4m3>, const Scales&, const QuantisedWeight&,
                                View<const bf16>, View<float>, Stream&);

}  // namespace tp
