#include "harness/device/device.h"
#include "harness/device/require.h"
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

// sums[2 * token + which] = this rank's sum of squares.
template <typename T>
__global__ void sum_squares_kernel(Norm<T> q, Norm<T> k, float* sums) {
  const Norm<T>& norm = blockIdx.y == 0 ? q : k;
  const std::int64_t token = blockIdx.x;
  const float sum = row_sum_of_squares(norm.x.data + token * norm.x.row_stride, norm.x.cols,
                                       dynamic_shared<float>());
  if (threadIdx.x == 0) sums[2 * token + blockIdx.y] = sum * norm.multiplier;
}

template <typename T>
__global__ void normalize_kernel(Norm<T> q, Norm<T> k, const float* sums, float eps) {
  const Norm<T>& norm = blockIdx.y == 0 ? q : k;
  const std::int64_t token = blockIdx.x;
  // Both operations round to nearest, on a GPU as on the host: rsqrtf would not give the same bits.
  const float inverse = 1.0f / sqrtf(sums[2 * token + blockIdx.y] / norm.divisor + eps);
  scale_row(norm.x.data + token * norm.x.row_stride, norm.weight,
            norm.out.data + token * norm.out.row_stride, norm.x.cols, inverse);
}

}  // namespace

template <typename T>
void qk_norm(View<const T> qkv, const QkNormWeights<T>& weights, View<T> q_out, View<T> k_out,
             float* sums, const ModelShape& model, const ShardingRules& rules, float eps,
             TpGroup& group, Stream& stream) {
  const int tp_size = group.tp_size(), tp_rank = group.tp_rank();
  const RankShape rank = partition(model, tp_size, tp_rank);
  const Shard q_cols = {0, rank.heads.size * model.head_dim};
  const Shard k_cols = {q_cols.end(), rank.kv_heads.size * model.head_dim};
  require(qkv.cols >= k_cols.end() + rank.kv_heads.size * model.value_head_dim(), "qk_norm",
          "the fused row has {} columns, q, k and v need {}",
          {qkv.cols, k_cols.end() + rank.kv_heads.size * model.value_head_dim()});
  require(weights.q.cols == q_cols.size, "qk_norm",
          "the q_norm weight has {} elements, q has {} columns", {weights.q.cols, q_cols.size});
  require(weights.k.cols == k_cols.size, "qk_norm",
          "the k_norm weight has {} elements, k has {} columns", {weights.k.cols, k_cols.size});
  require(q_out.rows == qkv.rows && q_out.cols == q_cols.size && k_out.rows == qkv.rows &&
              k_out.cols == k_cols.size,
          "qk_norm", "outputs are {} x {} and {} x {}, not {} x {} and {}",
          {q_out.rows, q_out.cols, k_out.rows, k_out.cols, qkv.rows, q_cols.size, k_cols.size});

  const Norm<T> q{qkv.columns(q_cols.offset, q_cols.size), weights.q.data, q_out,
                  float(q_cols.size * tp_size), 1.0f};
  // Ranks that share a KV head hold equal sums, so the total counts it once per replica, and so
  // does the divisor (sgl-project/sglang#20967 divided by the replicas, which is too little).
  const Norm<T> k{qkv.columns(k_cols.offset, k_cols.size), weights.k.data, k_out,
                  float(k_cols.size * rules.k_norm_shards(model, tp_size)),
                  rules.k_norm_counts(model, tp_size, tp_rank) ? 1.0f : 0.0f};

  const dim3 grid(unsigned(qkv.rows), 2);
  const int threads = row_threads(q_cols.size);  // at least as wide as k
  launch("qk_norm.sum_squares", sum_squares_kernel<T>, grid, dim3(unsigned(threads)),
         block_scratch_floats(threads) * sizeof(float), stream, q, k, sums);
  group.all_reduce_sum(sums, 2 * qkv.rows, stream);
  launch("qk_norm.normalize", normalize_kernel<T>, grid, dim3(unsigned(threads)), 0, stream, q, k,
         static_cast<const float*>(sums), eps);
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

}  // namespace tp
