#include "harness/device/device.h"
#include "harness/device/require.h"
#include "kernels/qk_columns.h"
#include "kernels/reduce.cuh"
#include "kernels/rope.h"

namespace tp {

namespace {

// The heads of q, or those of k.
template <typename T>
struct Heads {
  View<const T> x;
  NormWeight<T> weight;
  View<T> out;
};

struct Rotation {
  View<const float> cos_sin;
  const std::int32_t* positions;
  int rotary_dim;
  bool interleaved;
};

struct Statistics {
  bool normed;
  float eps;
  int heads_per_statistic;
};

constexpr int kHeadsPerBlock = 4;

// A block takes four neighbouring heads of a token, first those of q, then those of k. The sum of a
// head's squares is a warp's; what follows is the block's, a pair or a column that passes a thread,
// so that lanes of short heads do not idle.
template <typename T>
__global__ void rope_kernel(Heads<T> q, Heads<T> k, int head_dim, Rotation rotation,
                            Statistics statistics) {
  float* inverses = dynamic_shared<float>();
  const std::int64_t token = blockIdx.x;
  const int q_heads = int(q.x.cols / head_dim), all_heads = q_heads + int(k.x.cols / head_dim);
  const int first = int(blockIdx.y) * kHeadsPerBlock;
  const int left = all_heads - first, heads = left < kHeadsPerBlock ? left : kHeadsPerBlock,
            warp = int(threadIdx.x / 32);
  const auto head_in = [&](int head) {
    const Heads<T>& of = head < q_heads ? q : k;
    return of.x.data + token * of.x.row_stride +
           std::int64_t{head < q_heads ? head : head - q_heads} * head_dim;
  };
  if (statistics.normed) {
    if (warp < heads) {
      const float sum = warp_sum_of_squares(head_in(first + warp), head_dim);
      if (threadIdx.x % 32 == 0)
        inverses[warp] = inverse_root(sum / float(head_dim), statistics.eps);
    }
    __syncthreads();
  }

  const int pairs = rotation.rotary_dim / 2, work = head_dim - pairs;
  const float* cosines =
      rotation.cos_sin.data + rotation.positions[token] * rotation.cos_sin.row_stride;
  const float* sines = cosines + pairs;
  for (int i = int(threadIdx.x); i < heads * work; i += int(blockDim.x)) {
    const int in_block = i / work, at = i % work, head = first + in_block;
    const Heads<T>& of = head < q_heads ? q : k;
    const T* x = head_in(head);
    T* out = of.out.data + token * of.out.row_stride +
             std::int64_t{head < q_heads ? head : head - q_heads} * head_dim;
    const int statistic = in_block - in_block % statistics.heads_per_statistic;
    const auto value = [&](int j) {
      const float plain = to_float(x[j]);
      return statistics.normed ? plain * inverses[statistic] * of.weight[j] : plain;
    };
    if (at >= pairs) {  // behind the pairs: one that passes
      out[pairs + at] = from_float<T>(value(pairs + at));
      continue;
    }
    const int one = rotation.interleaved ? 2 * at : at,
              other = rotation.interleaved ? 2 * at + 1 : at + pairs;
    const float x1 = value(one), x2 = value(other), cosine = cosines[at], sine = sines[at];
    out[one] = from_float<T>(fmaf(x1, cosine, -(x2 * sine)));
    out[other] = from_float<T>(fmaf(x2, cosine, x1 * sine));
  }
}

}  // namespace

template <typename T>
void rope(View<const T> qkv, View<const float> cos_sin, const std::int32_t* positions,
          bool interleaved, const RopeNorm<T>* norm, View<T> q_out, View<T> k_out,
          const ModelShape& model, const RankShape& rank, const ShardingRules& rules,
          Stream& stream) {
  const auto [q_cols, k_cols] = qk_columns("rope", qkv, q_out, k_out, model, rank);
  require(cos_sin.cols >= 2 && cos_sin.cols % 2 == 0 && cos_sin.cols <= model.head_dim, "rope",
          "{} of the {} columns of a head cannot rotate in pairs", {cos_sin.cols, model.head_dim});
  Heads<T> q{qkv.columns(q_cols.offset, q_cols.size), {}, q_out},
      k{qkv.columns(k_cols.offset, k_cols.size), {}, k_out};
  Statistics statistics{norm != nullptr, 0, rules.rope.heads_per_statistic};
  if (norm != nullptr) {
    const auto check_weight = [&](const View<const T>& weight) {
      require(weight.data == nullptr || weight.cols == model.head_dim, "rope",
              "the norm's weight has {} elements, a head has {} columns",
              {weight.cols, model.head_dim});
    };
    check_weight(norm->q_weight);
    check_weight(norm->k_weight);
    q.weight = {norm->q_weight.data, norm->weight_offset};
    k.weight = {norm->k_weight.data, norm->weight_offset};
    statistics.eps = norm->eps;
  }
  const Rotation rotation{cos_sin, positions,
                          int(rules.rope.rotary_dim(model.head_dim, cos_sin.cols)),
                          rules.rope.interleaved(interleaved)};
  const std::int64_t heads = rank.heads.size + rank.kv_heads.size;
  launch("rope", rope_kernel<T>,
         dim3(unsigned(qkv.rows), unsigned((heads + kHeadsPerBlock - 1) / kHeadsPerBlock)),
         dim3(kHeadsPerBlock * 32), kHeadsPerBlock * sizeof(float), stream, q, k, model.head_dim,
         rotation, statistics);
}

Profile rope_norm_profile(const ModelShape& model) {
  return {.depth = warp_row_sum_depth(model.head_dim),
          .all_reduce_terms = 1,
          .terms = model.head_dim,
          .rsqrt_ulps = 1};
}

template void rope(View<const float>, View<const float>, const std::int32_t*, bool,
                   const RopeNorm<float>*, View<float>, View<float>, const ModelShape&,
                   const RankShape&, const ShardingRules&, Stream&);
template void rope(View<const f16>, View<const float>, const std::int32_t*, bool,
                   const RopeNorm<f16>*, View<f16>, View<f16>, const ModelShape&, const RankShape&,
                   const ShardingRules&, Stream&);
template void rope(View<const bf16>, View<const float>, const std::int32_t*, bool,
                   const RopeNorm<bf16>*, View<bf16>, View<bf16>, const ModelShape&,
                   const RankShape&, const ShardingRules&, Stream&);

}  // namespace tp
