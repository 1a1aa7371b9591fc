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

}  // namespace

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

template <typename R>
void reduce_results(View<R> sums, bool reduce_results, const ShardingRules& rules, TpGroup& group,
                    Stream& stream) {
  require_dense(sums);
  for (int i = 0; i < rules.linear.row_reductions(reduce_results, sums.rows, group.tp_size()); ++i)
    group.all_reduce_sum(sums.data, sums.rows * sums.cols, stream);
}

template <typename R>
void scatter_results(View<R> sums, std::int64_t tokens, View<R> mine, TpGroup& group,
                     Stream& stream) {
  require(sums.rows == mine.rows * group.tp_size() && mine.cols == sums.cols && sums.rows >= tokens,
          "row_linear", "{} rows of sums, of {} tokens, are scattered as {} rows to {} ranks",
          {sums.rows, tokens, mine.rows, group.tp_size()});
  require_dense(sums);
  require_dense(mine);
  View<R> beyond = sums;
  beyond.rows = sums.rows - tokens;
  beyond.data += tokens * sums.row_stride;
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

template void partial_sums(View<const float>, View<const float>, View<const float>, View<float>,
                           const ShardingRules&, const TpGroup&, Stream&);
template void partial_sums(View<const f16>, View<const f16>, View<const f16>, View<f16>,
                           const ShardingRules&, const TpGroup&, Stream&);
template void partial_sums(View<const f16>, View<const f16>, View<const f16>, View<float>,
                           const ShardingRules&, const TpGroup&, Stream&);
template void partial_sums(View<const bf16>, View<const bf16>, View<const bf16>, View<bf16>,
                           const ShardingRules&, const TpGroup&, Stream&);
template void partial_sums(View<const bf16>, View<const bf16>, View<const bf16>, View<float>,
                           const ShardingRules&, const TpGroup&, Stream&);
template void reduce_results(View<float>, bool, const ShardingRules&, TpGroup&, Stream&);
template void reduce_results(View<f16>, bool, const ShardingRules&, TpGroup&, Stream&);
template void reduce_results(View<bf16>, bool, const ShardingRules&, TpGroup&, Stream&);
template void scatter_results(View<float>, std::int64_t, View<float>, TpGroup&, Stream&);
template void scatter_results(View<f16>, std::int64_t, View<f16>, TpGroup&, Stream&);
template void scatter_results(View<bf16>, std::int64_t, View<bf16>, TpGroup&, Stream&);
template void reduce_row_linear(View<float>, bool, const ShardingRules&, TpGroup&, Stream&);
template void reduce_row_linear(View<f16>, bool, const ShardingRules&, TpGroup&, Stream&);
template void reduce_row_linear(View<bf16>, bool, const ShardingRules&, TpGroup&, Stream&);
template void store_sums(View<const float>, View<float>, Stream&);
template void store_sums(View<const f16>, View<f16>, Stream&);
template void store_sums(View<const float>, View<f16>, Stream&);
template void store_sums(View<const bf16>, View<bf16>, Stream&);
template void store_sums(View<const float>, View<bf16>, Stream&);

}  // namespace tp
