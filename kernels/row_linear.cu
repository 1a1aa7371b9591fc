#include "harness/device/device.h"
#include "harness/device/matmul.h"
#include "harness/device/require.h"
#include "kernels/reduce.cuh"
#include "kernels/row_linear.h"

namespace tp {

namespace {

template <typename R>
__global__ void zero_rows_kernel(View<R> rows) {
  R* row = rows.data + std::int64_t{blockIdx.x} * rows.row_stride;
  for (std::int64_t j = threadIdx.x; j < rows.cols; j += blockDim.x) row[j] = R{};
}

template <typename R>
void require_dense(const View<R>& sums) {
  require(sums.row_stride == sums.cols, "row_linear",
          "rows of {} sums are {} apart, but an all-reduce takes them as one",
          {sums.cols, sums.row_stride});
}

template <typename T, typename R>
__global__ void store_sums_kernel(View<const R> sums, View<T> out) {
  const std::int64_t row = blockIdx.x;
  for (std::int64_t j = threadIdx.x; j < out.cols; j += blockDim.x) {
    out.data[row * out.row_stride + j] =
        from_float<T>(to_float(sums.data[row * sums.row_stride + j]));
  }
}

// What this rank adds to the sums.
template <typename T, typename R>
void partial_sums(View<const T> x, View<const T> weight, View<const T> bias, View<R> sums,
                  const ShardingRules& rules, const TpGroup& group, Stream& stream) {
  require(weight.cols == x.cols, "row_linear", "the weight has {} columns, the input {}",
          {weight.cols, x.cols});
  require(bias.rows == 0 || bias.cols == weight.rows, "row_linear",
          "the bias has {} elements, the weight {} rows", {bias.cols, weight.rows});
  require_dense(sums);
  const bool adds_bias = bias.rows > 0 && rules.linear.row_adds_bias(group.tp_rank());
  matmul<T, R>(x, weight, adds_bias ? bias.data : nullptr, sums, stream);
}

}  // namespace

template <typename T, typename R>
void row_linear(View<const T> x, View<const T> weight, View<const T> bias, View<R> sums,
                bool reduce_results, const ShardingRules& rules, TpGroup& group, Stream& stream) {
  partial_sums(x, weight, bias, sums, rules, group, stream);
  for (int i = 0; i < rules.linear.row_reductions(reduce_results, x.rows, group.tp_size()); ++i)
    group.all_reduce_sum(sums.data, sums.rows * sums.cols, stream);
}

template <typename T, typename R>
void row_linear_scattered(View<const T> x, View<const T> weight, View<const T> bias, View<R> sums,
                          View<R> mine, const ShardingRules& rules, TpGroup& group,
                          Stream& stream) {
  require(sums.rows == mine.rows * group.tp_size() && mine.cols == sums.cols && sums.rows >= x.rows,
          "row_linear", "{} rows of sums, of {} tokens, are scattered as {} rows to {} ranks",
          {sums.rows, x.rows, mine.rows, group.tp_size()});
  require_dense(mine);
  View<R> of_tokens = sums, beyond = sums;
  of_tokens.rows = x.rows;
  beyond.rows = sums.rows - x.rows;
  beyond.data += x.rows * sums.row_stride;
  partial_sums(x, weight, bias, of_tokens, rules, group, stream);
  if (beyond.rows > 0) {
    launch("zero_rows", zero_rows_kernel<R>, dim3(unsigned(beyond.rows)),
           dim3(unsigned(row_threads(beyond.cols))), 0, stream, beyond);
  }
  group.reduce_scatter_sum(static_cast<const R*>(sums.data), mine.data, mine.rows * mine.cols,
                           stream);
}

template <typename R>
void reduce_row_linear(View<R> sums, bool reduced_results, const ShardingRules& rules,
                       TpGroup& group, Stream& stream) {
  require_dense(sums);
  for (int i = 0; i < rules.linear.row_caller_reductions(reduced_results); ++i)
    group.all_reduce_sum(sums.data, sums.rows * sums.cols, stream);
}

template <typename T, typename R>
void store_sums(View<const R> sums, View<T> out, Stream& stream) {
  require(sums.rows >= out.rows && sums.cols == out.cols, "store_sums",
          "sums are {} x {}, out is {} x {}", {sums.rows, sums.cols, out.rows, out.cols});
  launch("store_sums", store_sums_kernel<T, R>, dim3(unsigned(out.rows)),
         dim3(unsigned(row_threads(out.cols))), 0, stream, sums, out);
}

template void row_linear(View<const float>, View<const float>, View<const float>, View<float>, bool,
                         const ShardingRules&, TpGroup&, Stream&);
template void row_linear_scattered(View<const float>, View<const float>, View<const float>,
                                   View<float>, View<float>, const ShardingRules&, TpGroup&,
                                   Stream&);
template void row_linear(View<const f16>, View<const f16>, View<const f16>, View<f16>, bool,
                         const ShardingRules&, TpGroup&, Stream&);
template void row_linear_scattered(View<const f16>, View<const f16>, View<const f16>, View<f16>,
                                   View<f16>, const ShardingRules&, TpGroup&, Stream&);
template void row_linear(View<const f16>, View<const f16>, View<const f16>, View<float>, bool,
                         const ShardingRules&, TpGroup&, Stream&);
template void row_linear_scattered(View<const f16>, View<const f16>, View<const f16>, View<float>,
                                   View<float>, const ShardingRules&, TpGroup&, Stream&);
template void row_linear(View<const bf16>, View<const bf16>, View<const bf16>, View<bf16>, bool,
                         const ShardingRules&, TpGroup&, Stream&);
template void row_linear_scattered(View<const bf16>, View<const bf16>, View<const bf16>, View<bf16>,
                                   View<bf16>, const ShardingRules&, TpGroup&, Stream&);
template void row_linear(View<const bf16>, View<const bf16>, View<const bf16>, View<float>, bool,
                         const ShardingRules&, TpGroup&, Stream&);
template void row_linear_scattered(View<const bf16>, View<const bf16>, View<const bf16>,
                                   View<float>, View<float>, const ShardingRules&, TpGroup&,
                                   Stream&);
template void reduce_row_linear(View<float>, bool, const ShardingRules&, TpGroup&, Stream&);
template void reduce_row_linear(View<f16>, bool, const ShardingRules&, TpGroup&, Stream&);
template void reduce_row_linear(View<bf16>, bool, const ShardingRules&, TpGroup&, Stream&);
template void store_sums(View<const float>, View<float>, Stream&);
template void store_sums(View<const f16>, View<f16>, Stream&);
template void store_sums(View<const float>, View<f16>, Stream&);
template void store_sums(View<const bf16>, View<bf16>, Stream&);
template void store_sums(View<const float>, View<bf16>, Stream&);

}  // namespace tp
