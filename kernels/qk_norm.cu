#include <algorithm>
#include <optional>

#include "harness/device/device.h"
#include "harness/device/require.h"
#include "harness/group/peer_exchange.cuh"
#include "kernels/qk_columns.h"
#include "kernels/qk_norm.h"
#include "kernels/reduce.cuh"

namespace tp {

namespace {

// One of the two norms as the kernels see it.
template <typename T>
struct Norm {
  View<const T> x;
  const T* weight;
  View<T> out;
  float divisor;     // elements the all-reduced sum stands for
  float multiplier;  // of this rank's sum: 1, or 0 where it does not count
};

// Both of them. A block takes a token: the first q_threads threads its q, all others its k.
template <typename T>
struct Norms {
  Norm<T> q, k;
  int q_threads;
  float eps;
};

// What a thread reads and writes at a time.
template <typename T>
constexpr int kChunk = int(16 / sizeof(T));
template <typename T>
using Chunk = Vec<T, kChunk<T>>;
// Chunks of a row that a thread keeps in registers. Those of very wide rows are read again.
constexpr int kHeld = 4;
constexpr int kMaxWarps = 16;  // of a row

int warps_of(std::int64_t cols, std::int64_t chunk) {
  const std::int64_t warp = 32 * kHeld * chunk;
  return int(std::clamp<std::int64_t>((cols + warp - 1) / warp, 1, kMaxWarps));
}

// What a thread has of one of the norms: chunks thread, thread + threads, ... of each row.
template <typename T, bool kWhole>  // chunks are aligned, and rows have no rest
class Share {
 public:
  __device__ explicit Share(const Norms<T>& norms)
      : norm_(is_q(norms) ? norms.q : norms.k),
        first_((is_q(norms) ? int(threadIdx.x) : int(threadIdx.x) - norms.q_threads) * kChunk<T>),
        step_((is_q(norms) ? norms.q_threads : int(blockDim.x) - norms.q_threads) * kChunk<T>) {}
  __device__ static bool is_q(const Norms<T>& norms) { return int(threadIdx.x) < norms.q_threads; }

  __device__ void load_weights() { load(norm_.weight, weights_); }
  __device__ void load_row(std::int64_t token) { load(row(norm_.x, token), held_); }

  // The thread's part of a row's sum of squares; the row is loaded.
  __device__ float sum_of_squares(std::int64_t token) const {
    float sum = 0.0f;
    for_chunks(row(norm_.x, token), held_, [&](std::int64_t, int, const Chunk<T>& x) {
      for (int e = 0; e < kChunk<T>; ++e) sum = fmaf(to_float(x[e]), to_float(x[e]), sum);
    });
    return sum;
  }

  // out = x * inverse * weight, rounded once; row and weights are loaded.
  __device__ void normalize(std::int64_t token, float inverse) const {
    T* out = norm_.out.data + token * norm_.out.row_stride;
    for_chunks(row(norm_.x, token), held_, [&](std::int64_t col, int held, const Chunk<T>& x) {
      const Chunk<T> weight = held < kHeld ? weights_[held] : chunk_of(norm_.weight, col);
      Chunk<T> y;
      for (int e = 0; e < kChunk<T>; ++e)
        y[e] = from_float<T>(to_float(x[e]) * inverse * to_float(weight[e]));
      if constexpr (kWhole) {
        store_vector(out + col, y);
      } else {
        for (int e = 0; e < kChunk<T> && col + e < norm_.x.cols; ++e) out[col + e] = y[e];
      }
    });
  }

 private:
  __device__ static const T* row(const View<const T>& x, std::int64_t token) {
    return x.data + token * x.row_stride;
  }
  // Zeros behind the end of the row.
  __device__ Chunk<T> chunk_of(const T* row, std::int64_t col) const {
    if constexpr (kWhole) {
      return load_vector<T, kChunk<T>>(row + col);
    } else {
      Chunk<T> chunk;
      for (int e = 0; e < kChunk<T>; ++e)
        chunk[e] = col + e < norm_.x.cols ? row[col + e] : from_float<T>(0.0f);
      return chunk;
    }
  }
  __device__ void load(const T* row, Chunk<T> (&to)[kHeld]) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (first_ + i * step_ < norm_.x.cols) to[i] = chunk_of(row, first_ + i * step_);
    }
  }
  // f(column, number, chunk) for each of the thread's chunks, held or read again.
  template <typename F>
  __device__ void for_chunks(const T* row, const Chunk<T> (&held)[kHeld], F f) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (first_ + i * step_ < norm_.x.cols) f(first_ + i * step_, i, held[i]);
    }
    for (std::int64_t col = first_ + std::int64_t{kHeld} * step_; col < norm_.x.cols; col += step_)
      f(col, kHeld, chunk_of(row, col));
  }

  const Norm<T>& norm_;
  int first_, step_;  // in elements
  Chunk<T> held_[kHeld], weights_[kHeld];
};

// In shared memory.
struct Scratch {
  float partial[2 * kMaxWarps];  // of the block's warps
  Vec<float, 2> received[kMaxPeers];
  float inverse[2];
};

// This rank's sums of squares of q and k from those of the block's warps, in their order.
template <typename T>
__device__ Vec<float, 2> rank_sums(const Norms<T>& norms, const Scratch& scratch) {
  const int warps = int(blockDim.x) / 32, q_warps = norms.q_threads / 32;
  float q = scratch.partial[0], k = scratch.partial[q_warps];
  for (int w = 1; w < q_warps; ++w) q += scratch.partial[w];
  for (int w = q_warps + 1; w < warps; ++w) k += scratch.partial[w];
  return {{q * norms.q.multiplier, k * norms.k.multiplier}};
}

// The whole norm of all tokens on this rank. `reduced`: which of the statistics are all-reduced,
// those of q of all tokens first.
template <typename T, bool kWhole>
__global__ void __launch_bounds__(2 * kMaxWarps * 32)
    qk_norm_kernel(Norms<T> norms, Shard reduced, Peers peers) {
  Scratch& scratch = *dynamic_shared<Scratch>();
  const int thread = int(threadIdx.x);
  Share<T, kWhole> share(norms);
  share.load_weights();
  PeerChannel<> channel(peers, int(blockIdx.x));
  const std::int64_t tokens = norms.q.x.rows;
  for (std::int64_t token = blockIdx.x; token < tokens; token += gridDim.x) {
    share.load_row(token);
    const float sum = warp_sum(share.sum_of_squares(token));
    if (thread % 32 == 0) scratch.partial[thread / 32] = sum;
    __syncthreads();
    if (thread < 32) {
      const Vec<float, 2> mine = rank_sums(norms, scratch);
      if (thread < peers.tp_size) scratch.received[thread] = channel.exchange(peers, thread, mine);
      __syncwarp();
      if (thread < 2) {  // 0: q, 1: k
        float total = scratch.received[0][thread];
        for (int r = 1; r < peers.tp_size; ++r) total += scratch.received[r][thread];
        const std::int64_t statistic = thread * tokens + token - reduced.offset;
        if (statistic < 0 || statistic >= reduced.size) total = mine[thread];
        scratch.inverse[thread] =
            inverse_root(total / (thread == 0 ? norms.q : norms.k).divisor, norms.eps);
      }
    }
    __syncthreads();
    share.normalize(token, scratch.inverse[Share<T, kWhole>::is_q(norms) ? 0 : 1]);
  }
  if (thread == 0) channel.close(peers);
}

// The same in two kernels, with a collective between them. One block a token.
// sums[token] = this rank's sum of squares of q, sums[tokens + token] that of k.
template <typename T, bool kWhole>
__global__ void __launch_bounds__(2 * kMaxWarps * 32)
    sum_squares_kernel(Norms<T> norms, float* sums) {
  Scratch& scratch = *dynamic_shared<Scratch>();
  const int thread = int(threadIdx.x);
  const std::int64_t token = blockIdx.x;
  Share<T, kWhole> share(norms);
  share.load_row(token);
  const float sum = warp_sum(share.sum_of_squares(token));
  if (thread % 32 == 0) scratch.partial[thread / 32] = sum;
  __syncthreads();
  if (thread < 2) sums[thread * gridDim.x + token] = rank_sums(norms, scratch)[thread];
}

template <typename T, bool kWhole>
__global__ void __launch_bounds__(2 * kMaxWarps * 32)
    normalize_kernel(Norms<T> norms, const float* sums) {
  const std::int64_t token = blockIdx.x;
  Share<T, kWhole> share(norms);
  share.load_weights();
  share.load_row(token);
  const bool is_q = Share<T, kWhole>::is_q(norms);
  const float total = sums[(is_q ? 0 : gridDim.x) + token];
  share.normalize(token, inverse_root(total / (is_q ? norms.q : norms.k).divisor, norms.eps));
}

// Whether 16 bytes of it can be read or written at once.
template <typename T>
bool in_chunks(const View<T>& view) {
  return reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0 && view.cols % kChunk<T> == 0 &&
         view.row_stride % kChunk<T> == 0;
}
template <typename T>
bool in_chunks(const Norm<T>& norm) {
  return in_chunks(norm.x) && in_chunks(norm.out) &&
         reinterpret_cast<std::uintptr_t>(norm.weight) % 16 == 0;
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

namespace {

// How many blocks of the kernel that meets its peers a rank launches: nothing where they cannot
// meet. Of the same number on all ranks, whatever their rows' alignment.
template <typename T>
std::int64_t meeting_blocks(const Peers& peers, std::int64_t tokens, int threads) {
  const auto resident = [&](auto* kernel) {
    return resident_blocks("qk_norm", kernel, threads, sizeof(Scratch)) / peers.ranks_per_device;
  };
  const std::int64_t most = std::min(
      {peers.channels, resident(qk_norm_kernel<T, false>), resident(qk_norm_kernel<T, true>)});
  if (most == 0) return 0;
  const std::int64_t turns = (tokens + most - 1) / most;
  return (tokens + turns - 1) / turns;  // all of which have about as many tokens
}

}  // namespace

template <typename T>
void qk_norm(View<const T> qkv, const QkNormWeights<T>& weights, View<T> q_out, View<T> k_out,
             float* sums, const ModelShape& model, const ShardingRules& rules, float eps,
             TpGroup& group, Stream& stream, QkNormPath path) {
  const int tp_size = group.tp_size(), tp_rank = group.tp_rank();
  const auto [q_cols, k_cols] =
      qk_columns("qk_norm", qkv, q_out, k_out, model, partition(model, tp_size, tp_rank));
  require(weights.q.cols == q_cols.size, "qk_norm",
          "the q_norm weight has {} elements, q has {} columns", {weights.q.cols, q_cols.size});
  require(weights.k.cols == k_cols.size, "qk_norm",
          "the k_norm weight has {} elements, k has {} columns", {weights.k.cols, k_cols.size});
  const int q_threads = 32 * warps_of(q_cols.size, kChunk<T>);
  const int threads = q_threads + 32 * warps_of(k_cols.size, kChunk<T>);
  // Ranks that share a KV head hold equal sums, so the total counts it once per replica, and so
  // does the divisor (sgl-project/sglang#20967 divided by the replicas, which is too little).
  const Norms<T> norms{{qkv.columns(q_cols.offset, q_cols.size), weights.q.data, q_out,
                        float(q_cols.size * rules.norm.q_shards(model, tp_size)), 1.0f},
                       {qkv.columns(k_cols.offset, k_cols.size), weights.k.data, k_out,
                        float(k_cols.size * rules.norm.k_shards(model, tp_size)),
                        rules.norm.k_counts(model, tp_size, tp_rank) ? 1.0f : 0.0f},
                       q_threads,
                       eps};
  const Shard reduced = rules.norm.stats_reduced(qkv.rows);
  const dim3 tokens(unsigned(qkv.rows)), block{unsigned(threads)};
  const bool whole = in_chunks(norms.q) && in_chunks(norms.k);
  const auto choose = [&](auto* of_whole, auto* of_any) { return whole ? of_whole : of_any; };

  const std::optional<Peers> peers = path == QkNormPath::peer ? group.peers(stream) : std::nullopt;
  const std::int64_t blocks = peers ? meeting_blocks<T>(*peers, qkv.rows, threads) : 0;
  if (blocks > 0) {
    group.peer_exchange<float>(reduced.size, stream);
    launch("qk_norm", choose(qk_norm_kernel<T, true>, qk_norm_kernel<T, false>),
           dim3(unsigned(blocks)), block, sizeof(Scratch), stream, norms, reduced, *peers);
    return;
  }
  launch("qk_norm.sum_squares", choose(sum_squares_kernel<T, true>, sum_squares_kernel<T, false>),
         tokens, block, sizeof(Scratch), stream, norms, sums);
  group.all_reduce_sum(sums + reduced.offset, reduced.size, stream);
  launch("qk_norm.normalize", choose(normalize_kernel<T, true>, normalize_kernel<T, false>), tokens,
         block, 0, stream, norms, static_cast<const float*>(sums));
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

QkNormProfiles qk_norm_profiles(const ModelShape& model, DType dtype, int tp_size) {
  const RankShape rank = partition(model, tp_size, 0);  // all ranks are equally wide
  const std::int64_t chunk = 16 / size_of(dtype);
  const auto profile = [&](std::int64_t cols) {
    const int warps = warps_of(cols, chunk);
    const std::int64_t step = 32 * warps * chunk;  // what all threads take at a time
    // A thread's chunks, its warp, the warps one after another.
    return Profile{.depth = (cols + step - 1) / step * chunk + kWarpSumDepth + warps - 1,
                   .all_reduce_terms = tp_size,
                   .terms = cols * tp_size,
                   .rsqrt_ulps = 1};
  };
  return {profile(rank.heads.size * model.head_dim), profile(rank.kv_heads.size * model.head_dim)};
}

template void qk_norm(View<const float>, const QkNormWeights<float>&, View<float>, View<float>,
                      float*, const ModelShape&, const ShardingRules&, float, TpGroup&, Stream&,
                      QkNormPath);
template void qk_norm(View<const f16>, const QkNormWeights<f16>&, View<f16>, View<f16>, float*,
                      const ModelShape&, const ShardingRules&, float, TpGroup&, Stream&,
                      QkNormPath);
template void qk_norm(View<const bf16>, const QkNormWeights<bf16>&, View<bf16>, View<bf16>, float*,
                      const ModelShape&, const ShardingRules&, float, TpGroup&, Stream&,
                      QkNormPath);
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
