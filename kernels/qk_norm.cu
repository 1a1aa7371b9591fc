#include "harness/device/device.h"
#include "harness/device/require.h"
#include "kernels/qk_columns.h"
#include "kernels/qk_norm.h"
#include "kernels/reduce.cuh"

namespace tp {

namespace {

// One of the two norms as the kernels see it. blockIdx.y says which: 0 is q, 1 is k.
template <typename T>
struct Norm {
  View<const T> x;
  const T* weight;
  View<T> out;
  float divisor;     // elements the all-reduced sum stands for
  float multiplier;  // of this rank's sum: 1, or 0 where it does not count
};

// Sum of squares of a row, in every thread of the block. scratch: block_scratch_floats in shared
// memory.
template <typename T>
__device__ float row_sum_of_squares(const T* row, std::int64_t cols, float* scratch) {
  float sum = 0.0f;
  for (std::int64_t j = threadIdx.x; j < cols; j += blockDim.x) {
    const float x = to_float(row[j]);
    sum = fmaf(x, x, sum);
  }
  return block_sum(sum, scratch);
}

// out[j] = x[j] * inverse * weight[j], rounded once.
template <typename T>
__device__ void scale_row(const T* x, const T* weight, T* out, std::int64_t cols, float inverse) {
  for (std::int64_t j = threadIdx.x; j < cols; j += blockDim.x) {
    out[j] = from_float<T>(to_float(x[j]) * inverse * to_float(weight[j]));
  }
}

// sums[token] = this rank's sum of squares of q, sums[tokens + token] that of k.
template <typename T>
__global__ void sum_squares_kernel(Norm<T> q, Norm<T> k, float* sums) {
  const Norm<T>& norm = blockIdx.y == 0 ? q : k;
  const std::int64_t token = blockIdx.x;
  const float sum = row_sum_of_squares(norm.x.data + token * norm.x.row_stride, norm.x.cols,
                                       dynamic_shared<float>());
  if (threadIdx.x == 0) sums[blockIdx.y * gridDim.x + token] = sum * norm.multiplier;
}

template <typename T>
__global__ void normalize_kernel(Norm<T> q, Norm<T> k, const float* sums, float eps) {
  const Norm<T>& norm = blockIdx.y == 0 ? q : k;
  const std::int64_t token = blockIdx.x;
  const float inverse = inverse_root(sums[blockIdx.y * gridDim.x + token] / norm.divisor, eps);
  scale_row(norm.x.data + token * norm.x.row_stride, norm.weight,
            norm.out.data + token * norm.out.row_stride, norm.x.cols, inverse);
}

// One of the two norms of single heads.
template <typename T>
struct HeadNorm {
  View<const T> x;
  NormWeight<T> weight;  // of head_dim columns, for every head the same
  View<T> out;
  std::int64_t width;  // columns that one statistic spans: a head
};

constexpr int kHeadsPerBlock = 4;

// One warp a head: heads of q, then heads of k.
template <typename T>
__global__ void norm_heads_kernel(HeadNorm<T> q, HeadNorm<T> k, int head_dim, float eps) {
  const std::int64_t token = blockIdx.x, q_heads = q.x.cols / q.width;
  const std::int64_t head = std::int64_t{blockIdx.y} * kHeadsPerBlock + threadIdx.x / 32;
  if (head >= q_heads + k.x.cols / k.width) return;
  const HeadNorm<T>& norm = head < q_heads ? q : k;
  const std::int64_t first = (head < q_heads ? head : head - q_heads) * norm.width;
  const T* x = norm.x.data + token * norm.x.row_stride + first;
  T* out = norm.out.data + token * norm.out.row_stride + first;
  const float inverse = inverse_root(warp_sum_of_squares(x, norm.width) / float(norm.width), eps);
  const int in_head = int(first % head_dim);  // 0, where a statistic spans a head
  for (int j = int(threadIdx.x % 32); j < norm.width; j += 32) {
    const int col = in_head + j;
    const float weight = norm.weight[col < head_dim ? col : col - head_dim];
    out[j] = from_float<T>(to_float(x[j]) * inverse * weight);
  }
}

}  // namespace

template <typename T>
void qk_norm(View<const T> qkv, const QkNormWeights<T>& weights, View<T> q_out, View<T> k_out,
             float* sums, const ModelShape& model, const ShardingRules& rules, float eps,
             TpGroup& group, Stream& stream) {
  const int tp_size = group.tp_size(), tp_rank = group.tp_rank();
  const auto [q_cols, k_cols] =
      qk_columns("qk_norm", qkv, q_out, k_out, model, partition(model, tp_size, tp_rank));
  require(weights.q.cols == q_cols.size, "qk_norm",
          "the q_norm weight has {} elements, q has {} columns", {weights.q.cols, q_cols.size});
  require(weights.k.cols == k_cols.size, "qk_norm",
          "the k_norm weight has {} elements, k has {} columns", {weights.k.cols, k_cols.size});
  const Norm<T> q{qkv.columns(q_cols.offset, q_cols.size), weights.q.data, q_out,
                  float(q_cols.size * rules.norm.q_shards(model, tp_size)), 1.0f};
  // Ranks that share a KV head hold equal sums, so the total counts it once per replica, and so
  // does the divisor (sgl-project/sglang#20967 divided by the replicas, which is too little).
  const Norm<T> k{qkv.columns(k_cols.offset, k_cols.size), weights.k.data, k_out,
                  float(k_cols.size * rules.norm.k_shards(model, tp_size)),
                  rules.norm.k_counts(model, tp_size, tp_rank) ? 1.0f : 0.0f};

  const dim3 grid(unsigned(qkv.rows), 2);
  const int threads = row_threads(q_cols.size);  // at least as wide as k
  launch("qk_norm.sum_squares", sum_squares_kernel<T>, grid, dim3(unsigned(threads)),
         block_scratch_floats(threads) * sizeof(float), stream, q, k, sums);
  const Shard reduced = rules.norm.stats_reduced(qkv.rows);
  group.all_reduce_sum(sums + reduced.offset, reduced.size, stream);
  launch("qk_norm.normalize", normalize_kernel<T>, grid, dim3(unsigned(threads)), 0, stream, q, k,
         static_cast<const float*>(sums), eps);
}

template <typename T>
void qk_head_norm(View<const T> qkv, const QkNormWeights<T>& weights, float weight_offset,
                  View<T> q_out, View<T> k_out, const ModelShape& model, const RankShape& rank,
                  const ShardingRules& rules, float eps, Stream& stream) {
  const auto [q_cols, k_cols] = qk_columns("qk_head_norm", qkv, q_out, k_out, model, rank);
  const auto check_weight = [&](const View<const T>& weight) {
    require(weight.data == nullptr || weight.cols == model.head_dim, "qk_head_norm",
            "the weight has {} elements, a head has {} columns", {weight.cols, model.head_dim});
  };
  check_weight(weights.q);
  check_weight(weights.k);
  const auto norm = [&](Shard cols, View<const T> weight, View<T> out, Shard heads, int all_heads) {
    const std::int64_t width = rules.norm.head_width(model.head_dim, heads.size, all_heads);
    require(width > 0 && cols.size % width == 0, "qk_head_norm",
            "{} columns are not a whole number of heads of {}", {cols.size, width});
    return HeadNorm<T>{
        qkv.columns(cols.offset, cols.size), {weight.data, weight_offset}, out, width};
  };
  const HeadNorm<T> q = norm(q_cols, weights.q, q_out, rank.heads, model.num_heads),
                    k = norm(k_cols, weights.k, k_out, rank.kv_heads, model.num_kv_heads);
  const std::int64_t heads = q.x.cols / q.width + k.x.cols / k.width;
  launch("qk_head_norm", norm_heads_kernel<T>,
         dim3(unsigned(qkv.rows), unsigned((heads + kHeadsPerBlock - 1) / kHeadsPerBlock)),
         dim3(kHeadsPerBlock * 32), 0, stream, q, k, model.head_dim, eps);
}

Profile qk_head_norm_profile(const ModelShape& model) {
  return {.depth = warp_row_sum_depth(model.head_dim),
          .all_reduce_terms = 1,
          .terms = model.head_dim,
          .rsqrt_ulps = 1};
}

QkNormProfiles qk_norm_profiles(const ModelShape& model, int tp_size) {
  const RankShape rank = partition(model, tp_size, 0);  // all ranks are equally wide
  const std::int64_t q_cols = rank.heads.size * model.head_dim,
                     k_cols = rank.kv_heads.size * model.head_dim;
  const int threads = row_threads(q_cols);
  const auto profile = [&](std::int64_t cols) {
    return Profile{.depth = row_sum_depth(cols, threads),
                   .all_reduce_terms = tp_size,
                   .terms = cols * tp_size,
                   .rsqrt_ulps = 1};
  };
  return {profile(q_cols), profile(k_cols)};
}

template void qk_norm(View<const float>, const QkNormWeights<float>&, View<float>, View<float>,
                      float*, const ModelShape&, const ShardingRules&, float, TpGroup&, Stream&);
template void qk_norm(View<const f16>, const QkNormWeights<f16>&, View<f16>, View<f16>, float*,
                      const ModelShape&, const ShardingRules&, float, TpGroup&, Stream&);
template void qk_norm(View<const bf16>, const QkNormWeights<bf16>&, View<bf16>, View<bf16>, float*,
                      const ModelShape&, const ShardingRules&, float, TpGroup&, Stream&);
template void qk_head_norm(View<const float>, const QkNormWeights<float>&, float, View<float>,
                           View<float>, const ModelShape&, const RankShape&, const ShardingRules&,
                           float, Stream&);
template void qk_head_norm(View<const f16>, const QkNormWeights<f16>&, float, View<f16>, View<f16>,
                           const ModelShape&, const RankShape&, const ShardingRules&, float,
                           Stream&);
template void qk_head_norm(View<const bf16>, const QkNormWeights<bf16>&, float, View<bf16>,
                           View<bf16>, const ModelShape&, const RankShape&, const ShardingRules&,
                           float, Stream&);

}  // namespace tp
